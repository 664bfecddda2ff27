"""A rank's part of a run: its share of the model, of the optimizer's states, and its step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanotron_fast.model.topology import Topology
from nanotron_fast.models.architecture import Architecture
from nanotron_fast.models.building import load
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.models.facts import facts_of
from nanotron_fast.models.initial_weights import initialize, mup_learning_rate_factor
from nanotron_fast.parallel.pipeline import Pipeline
from nanotron_fast.train.balance import Balance
from nanotron_fast.train.config import CheckpointInit, MupInit, RandomInit, TrainingConfig
from nanotron_fast.train.gradients import Gradients
from nanotron_fast.train.mesh import Mesh, groups_of_copies
from nanotron_fast.train.optimizer import AdamW
from nanotron_fast.train.optimizer_choice import optimizer_of
from nanotron_fast.train.parameters import Trained, frozen_parameters, trained_parameters
from nanotron_fast.train.step import TrainingStep


@dataclass(frozen=True, slots=True)
class Engine:
    """What a rank trains with.

    Args:
        parts: the modules of this rank, from the front of the model to its end.
        trained: their parameters; `frozen`: those that no step moves.
        optimizer: of these.
        step: takes one.
    """

    parts: tuple[Decoder, ...]
    trained: tuple[Trained, ...]
    frozen: tuple[Trained, ...]
    optimizer: AdamW
    step: TrainingStep


def engine_of(
    config: TrainingConfig, architecture: Architecture, mesh: Mesh, *, weights: Path | None = None
) -> Engine:
    """Builds this rank's modules, fills them, and puts the optimizer beside them.

    Args:
        architecture: the model, its vocabulary padded to what the ranks need.
        weights: a checkpoint in either format, at any topology, of which this rank's ranges are
            read; None for what the configuration's init_method says.

    Raises what `models.load` raises.
    """
    layout = config.parallelism
    parts = tuple(_part(config, architecture, mesh, chunk) for chunk in range(layout.chunks))
    for part in parts:
        _fill(part, config, mesh, weights)
    facts = [facts_of(part) for part in parts]
    zero_stage = config.optimizer.zero_stage
    trained = tuple(trained_parameters(parts, facts, mesh, zero_stage=zero_stage))
    pipeline = Pipeline(
        parts,
        group=mesh.pp_group,
        schedule=_schedule(config),
        hidden_size=architecture.spec.hidden_size,
        dtype=dtype_of(config),
        device=mesh.device,
        tokens_split=layout.tp if layout.tp_mode == "REDUCE_SCATTER" else 1,
    )
    layers = architecture.spec.layers
    numbers = (layer.attention.copies_of_kv_heads(layout.tp) for layer in layers)
    copies = groups_of_copies(mesh, numbers)
    optimizer = optimizer_of(config, trained, mesh, _peaks(config, trained))
    step = TrainingStep(
        pipeline,
        Gradients(trained, mesh, zero_stage=zero_stage, copies=copies),
        optimizer,
        mesh,
        max_norm=config.optimizer.clip_grad,
        balance=Balance(parts, mesh, rate=config.optimizer.router_bias_rate),
    )
    frozen = tuple(frozen_parameters(parts, facts, mesh))
    return Engine(parts, trained, frozen, optimizer, step)


def _schedule(config: TrainingConfig) -> str:
    """With fewer micro-batches than stages 1f1b has nothing to alternate."""
    layout = config.parallelism
    is_short = config.tokens.batch_accumulation_per_replica < layout.pp
    return "afab" if layout.pp_engine == "1f1b" and is_short else layout.pp_engine


def dtype_of(config: TrainingConfig) -> torch.dtype:
    """Of the parameters."""
    dtype = getattr(torch, config.model.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _part(config: TrainingConfig, architecture: Architecture, mesh: Mesh, chunk: int) -> Decoder:
    layout = config.parallelism
    topology = Topology(tp=layout.tp, pp=layout.pp, ep=layout.expert_parallel_size)
    blocks = None
    if layout.chunks > 1:
        stages = Topology(tp=layout.tp, pp=layout.pp * layout.chunks)
        blocks = architecture.blocks_of(stages, chunk * layout.pp + mesh.pp_rank)
    given: Mapping[str, Any] = config.model.model_config or {}
    # With ZeRO-3 all of it may be too large for the device, which gets a layer at a time.
    is_by_rows = config.optimizer.zero_stage == 3 and layout.dp > 1
    return Decoder(
        architecture,
        topology=topology,
        stage=mesh.pp_rank,
        blocks=blocks,
        group=mesh.tp_group,
        expert_group=mesh.ep_group,
        mode=layout.tp_mode.lower(),
        recompute="layer" if layout.recompute_layer else "none",
        z_loss=given.get("z_loss_coefficient", 0.0) if given.get("z_loss_enabled") else 0.0,
        # Of a step it is the mean over micro batches, as the loss is.
        auxiliary_loss=config.optimizer.router_aux_loss
        / config.tokens.batch_accumulation_per_replica,
        counts_load=config.optimizer.router_bias_rate > 0,
        dtype=dtype_of(config),
        device="cpu" if is_by_rows else mesh.device,
    )


def _fill(part: Decoder, config: TrainingConfig, mesh: Mesh, weights: Path | None) -> None:
    init = config.model.init_method
    tp_rank, ep_rank = mesh.tp_rank, mesh.ep_rank
    if weights is None and isinstance(init, CheckpointInit):
        weights = Path(init.path)
    if weights is not None:
        rows = part.architecture.spec.vocab_size
        load(part, weights, tp_rank=tp_rank, ep_rank=ep_rank, pad_vocab_to_multiple_of=rows)
        return
    seed = config.general.seed
    if isinstance(init, RandomInit):
        scales_rows = init.scaling_method == "NUM_LAYERS"
        initialize(
            part,
            tp_rank=tp_rank,
            ep_rank=ep_rank,
            seed=seed,
            std=init.std,
            scales_rows=scales_rows,
        )
    else:
        initialize(part, tp_rank=tp_rank, ep_rank=ep_rank, seed=seed, is_mup=True)


def _peaks(config: TrainingConfig, trained: tuple[Trained, ...]) -> dict[str, float]:
    """The highest learning rate of each parameter, where muP gives it one of its own."""
    if not isinstance(config.model.init_method, MupInit):
        return {}
    highest = config.optimizer.learning_rate_scheduler.learning_rate
    return {each.name: highest * mup_learning_rate_factor(each.facts) for each in trained}
