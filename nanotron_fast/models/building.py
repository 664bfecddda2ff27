"""A decoder from a checkpoint or an architecture, ready to run on one rank."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from nanotron_fast.checkpoints.load import load_into
from nanotron_fast.checkpoints.options import LoadChoices
from nanotron_fast.errors import TopologyError
from nanotron_fast.kernels.runtime.collectives import Group, resolve
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.models.architecture import Architecture, Block, with_our_target
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.models.initial_weights import initialize

if TYPE_CHECKING:
    from typing_extensions import Unpack


def build(
    source: str | Path | ModelSpec | Architecture,
    *,
    mesh: DeviceMesh | None = None,
    topology: Topology | None = None,
    rank: int | None = None,
    group: Group = None,
    blocks: Iterable[Block] | None = None,
    mode: str = "all_reduce",
    recompute: str = "none",
    z_loss: float = 0.0,
    z_loss_mode: str = "nanotron",
    auxiliary_loss: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 42,
    **choices: Unpack[LoadChoices],
) -> Decoder:
    """This rank's part of a model: with the weights of a checkpoint, or with random ones.

    The modules are made on the meta device, then given memory, then filled: at the most the rank's
    own shards and the staging buffers of `load_into` exist, which reads this rank's bytes alone.

    Args:
        source: a folder in Hugging Face's or Nanotron's format, at any topology, or the id of a
            model on the Hub; or an architecture.
        mesh: with a dimension "tp", "pp" or both (others are not looked at). It says the
            topology, the rank and the group.
        topology, rank, group: instead of a mesh. `rank` is pp_rank * tp + tp_rank; without it
            the first stage, and the place in the group.
        blocks, mode, recompute, z_loss, z_loss_mode, auxiliary_loss, dtype: as of `Decoder`.
        device: where the parameters are.
        seed: of random weights; see `models.initial_weights`.
        choices: the options of `load_into`, for a checkpoint.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError, TopologyError, OSError: as `load_into`.
    """
    if mesh is not None:
        if topology is not None or rank is not None or group is not None:
            raise TopologyError("a mesh says topology, rank and group: give it or them")
        topology, rank, group = _read_mesh(mesh)
    topology = topology or Topology(tp=resolve(group).size)
    rank = resolve(group).rank if rank is None else rank
    stage, tp_rank = divmod(rank, topology.tp)
    if isinstance(source, Architecture):
        architecture = source
    elif isinstance(source, ModelSpec):
        architecture = Architecture.of_spec(source)
    else:
        architecture = Architecture.of_checkpoint(source, **choices)
    decoder = Decoder(
        architecture,
        topology=topology,
        stage=stage,
        blocks=blocks,
        group=group,
        mode=mode,
        recompute=recompute,
        z_loss=z_loss,
        z_loss_mode=z_loss_mode,
        auxiliary_loss=auxiliary_loss,
        dtype=dtype,
        device=device,
    )
    if isinstance(source, ModelSpec | Architecture):
        initialize(decoder, tp_rank=tp_rank, seed=seed)
    else:
        load(decoder, source, tp_rank=tp_rank, **choices)
    return decoder


def load(
    decoder: Decoder, path: str | Path, *, tp_rank: int = 0, **choices: Unpack[LoadChoices]
) -> None:
    """Fills a decoder that has memory from a checkpoint, whatever blocks it has.

    Raises what `load_into` raises.
    """
    wanted: dict[str, Any] = {**with_our_target(choices)}
    wanted.setdefault("rope_interleaved", decoder.architecture.rope_interleaved)
    # The decoder has its rows already: the next multiple of their number is that.
    wanted.setdefault("pad_vocab_to_multiple_of", decoder.architecture.spec.vocab_size)
    load_into(
        decoder,
        path,
        topology=decoder.topology,
        rank=tp_rank,
        blocks=decoder.blocks,
        **wanted,
    )


def _read_mesh(mesh: DeviceMesh) -> tuple[Topology, int, Group]:
    names = mesh.mesh_dim_names or ()
    if not {"tp", "pp"} & set(names):
        raise TopologyError(
            f"the mesh has the dimensions {list(names)}, and should have one named tp or pp"
        )
    sizes = {name: mesh[name].size() if name in names else 1 for name in ("tp", "pp")}
    ranks = {name: mesh[name].get_local_rank() if name in names else 0 for name in ("tp", "pp")}
    group = mesh["tp"].get_group() if sizes["tp"] > 1 else None
    return Topology(**sizes), ranks["pp"] * sizes["tp"] + ranks["tp"], group
