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
    expert_group: Group = None,
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
        mesh: with some of the dimensions "tp", "pp" and "ep" (others are not looked at). It says
            the topology, the rank and the groups.
        topology, rank, group, expert_group: instead of a mesh. `rank` is (ep_rank * pp + pp_rank)
            * tp + tp_rank; without it the first stage, and the places in the groups.
        blocks, mode, recompute, z_loss, z_loss_mode, auxiliary_loss, dtype: as of `Decoder`.
        device: where the parameters are.
        seed: of random weights; see `models.initial_weights`.
        choices: the options of `load_into`, for a checkpoint.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError, TopologyError, OSError: as `load_into`.
    """
    if mesh is not None:
        if any(each is not None for each in (topology, rank, group, expert_group)):
            raise TopologyError("a mesh says topology, rank and groups: give it or them")
        topology, rank, group, expert_group = _read_mesh(mesh)
    tp_ranks, ep_ranks = resolve(group), resolve(expert_group)
    topology = topology or Topology(tp=tp_ranks.size, ep=ep_ranks.size)
    if rank is None:
        rank = ep_ranks.rank * topology.pp * topology.tp + tp_ranks.rank
    replica, tp_rank = divmod(rank, topology.tp)
    ep_rank, stage = divmod(replica, topology.pp)
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
        expert_group=expert_group,
        mode=mode,
        recompute=recompute,
        z_loss=z_loss,
        z_loss_mode=z_loss_mode,
        auxiliary_loss=auxiliary_loss,
        dtype=dtype,
        device=device,
    )
    if isinstance(source, ModelSpec | Architecture):
        initialize(decoder, tp_rank=tp_rank, ep_rank=ep_rank, seed=seed)
    else:
        load(decoder, source, tp_rank=tp_rank, ep_rank=ep_rank, **choices)
    return decoder


def load(
    decoder: Decoder,
    path: str | Path,
    *,
    tp_rank: int = 0,
    ep_rank: int = 0,
    **choices: Unpack[LoadChoices],
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
        rank=ep_rank * decoder.topology.pp * decoder.topology.tp + tp_rank,
        blocks=decoder.blocks,
        **wanted,
    )


def _read_mesh(mesh: DeviceMesh) -> tuple[Topology, int, Group, Group]:
    names = mesh.mesh_dim_names or ()
    axes = ("tp", "pp", "ep")
    if not set(axes) & set(names):
        raise TopologyError(
            f"the mesh has the dimensions {list(names)}, and should have one named tp, pp or ep"
        )
    sizes = {name: mesh[name].size() if name in names else 1 for name in axes}
    ranks = {name: mesh[name].get_local_rank() if name in names else 0 for name in axes}
    groups = {name: mesh[name].get_group() if sizes[name] > 1 else None for name in axes}
    rank = (ranks["ep"] * sizes["pp"] + ranks["pp"]) * sizes["tp"] + ranks["tp"]
    return Topology(**sizes), rank, groups["tp"], groups["ep"]
