"""What a run will take, from its configuration alone: parameters, FLOPs, a rank's memory, disk.

FLOPs of a step are those that the model needs, so recomputation is not counted:

    6 N tokens + sum over layers of 12 H d pairs

N counts the parameters of products that a token goes through: not the input embedding (unless it is
the head too), not the norms, and of experts those that it is sent to. Pairs are the queries and the
keys that they see, the causal half or less with a window: s (s + 1) / 2 for a sequence of s. A
backward pass takes twice a forward pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanotron_fast.families.parts import Param
from nanotron_fast.families.roles import is_hidden_matrix
from nanotron_fast.formats.nanotron.stages import Stages
from nanotron_fast.model.spec import Experts
from nanotron_fast.models.names import names_of
from nanotron_fast.train.activations import MicroBatch, in_flight
from nanotron_fast.train.architecture import ModelPlan
from nanotron_fast.train.config import Muon, TrainingConfig

VALUE_BYTES = {"bfloat16": 2, "float32": 4}
_EXPERTS = ".mlp.experts."


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank. What CUDA, NCCL and the allocator's gaps take comes on top.

    Args:
        weights: the parameters; with ZeRO-3 what is gathered of them at once, and of parameters in
            fp32 the rank's rows.
        gradients: in fp32; with ZeRO-3 of the rank's rows, and those that are not scattered yet.
        masters: fp32 copies of parameters that are not fp32; with ZeRO-3 of the rank's rows.
        moments: the optimizer's.
        activations: of the micro batches that are under way at once, the largest layer's backward
            pass, and what a pipeline receives into.
        logits: of the micro batches that are under way at once, and a rank's part of the
            vocabulary; where they are capped, with what the cap keeps and their gradient, and else
            that takes their place.
    """

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will take.

    Args:
        parameters: of the model, vocabulary padding left out; a tied matrix counts once.
        layer_stages: the pipeline rank of each layer.
        tokens_per_step: over all ranks, at the first data stage's sequence length.
        flops_per_step: likewise, by the formula above.
        memory_by_stage: of a rank of each pipeline stage, at the longest sequence length.
    """

    parameters: int
    layer_stages: tuple[int, ...]
    tokens_per_step: int
    flops_per_step: int
    memory_by_stage: tuple[Memory, ...]

    @property
    def fullest_stage(self) -> int:
        """The stage whose ranks need most."""
        totals = [memory.total for memory in self.memory_by_stage]
        return totals.index(max(totals))

    @property
    def memory(self) -> Memory:
        """Of a rank of that stage."""
        return self.memory_by_stage[self.fullest_stage]

    def to_json(self) -> dict[str, Any]:
        """For `train --dry-run --json`."""
        return {
            "parameters": self.parameters,
            "stages": list(self.layer_stages),
            "tokens_per_step": self.tokens_per_step,
            "flops_per_step": self.flops_per_step,
            "memory": {**asdict(self.memory), "total": self.memory.total},
        }


def estimate(config: TrainingConfig, model: ModelPlan) -> Estimate:
    """What a run will take. Raises TopologyError where a stage would own no layer."""
    stages, spec = model.stages(), model.architecture.spec
    pp = config.parallelism.pp
    padding = spec.vocab_size - model.architecture.vocab_size
    padded_elements = sum(math.prod(param.shape) for param in model.params)
    num_matrices = 1 if spec.tie_word_embeddings else 2
    length = config.stage_at(1).sequence_length or config.tokens.sequence_length
    return Estimate(
        parameters=padded_elements - num_matrices * padding * spec.hidden_size,
        layer_stages=tuple(stage % pp for stage in stages.layers),
        tokens_per_step=config.global_batch_size * length,
        flops_per_step=config.global_batch_size * flops_of_sequence(model, length),
        memory_by_stage=tuple(_memory(config, model, stages, rank) for rank in range(pp)),
    )


def checkpoint_bytes(config: TrainingConfig, model: ModelPlan) -> int:
    """Bytes that a checkpoint of the run takes, where what several ranks write counts once.

    Headers and small files come on top.
    """
    total = 0
    for param in model.params:
        value_bytes = 4 if param.is_fp32 else VALUE_BYTES[config.model.dtype]
        # Whatever the dtype, the optimizer's file has fp32 masters beside the moments.
        states = 0 if param.is_frozen else 4 * (1 + _num_moments(config, param))
        exported = value_bytes if config.checkpoints.export_hf else 0
        total += math.prod(param.shape) * (value_bytes + states + exported)
    return total


def flops_of_sequence(model: ModelPlan, length: int) -> int:
    """FLOPs of training on one sequence, forward and backward."""
    products = sum(_multiplied(model, param) for param in model.params)
    attention = sum(
        12
        * layer.attention.num_heads
        * layer.attention.head_dim
        * _pairs(length, layer.attention.window)
        for layer in model.architecture.spec.layers
    )
    return 6 * products * length + attention


def _pairs(length: int, window: int | None) -> int:
    """Queries and the keys that each sees: the last `window` or all before it, and itself."""
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def _multiplied(model: ModelPlan, param: Param) -> int:
    """The elements of a parameter that a token is multiplied by."""
    is_lookup = param.block == "embedding" and not model.architecture.spec.tie_word_embeddings
    if len(param.shape) < 2 or is_lookup:
        return 0
    elements = math.prod(param.shape)
    if isinstance(param.block, int) and _EXPERTS in param.name:
        experts = model.architecture.spec.layers[param.block].mlp
        assert isinstance(experts, Experts)
        return elements * experts.top_k // experts.num_experts
    return elements


def _memory(config: TrainingConfig, model: ModelPlan, stages: Stages, rank: int) -> Memory:
    """What a rank of a pipeline stage needs."""
    pp = config.parallelism.pp
    has_head = stages.of("head") % pp == rank
    states, blocks = Memory(), Counter[int | str]()
    for param in model.params:
        # The last stage has a copy of a tied embedding.
        has_copy = (
            param.block == "embedding" and has_head and model.architecture.spec.tie_word_embeddings
        )
        if stages.of(param.block) % pp == rank or has_copy:
            states = _sum(states, _states(config, model, param))
            if _is_by_rows(config, param):
                blocks[param.block] += math.prod(param.local_shape(model.topology.sizes))
    if blocks:
        states = _sum(states, _gathered(blocks, VALUE_BYTES[config.model.dtype]))
    longest = max(stage.sequence_length or 0 for stage in config.data_stages)
    tokens = config.tokens.micro_batch_size * longest
    columns = model.architecture.spec.vocab_size // config.parallelism.tp
    copies = 1 if model.architecture.spec.logit_softcap is None else 3
    return replace(
        states,
        activations=_activations(config, model, stages, rank, tokens),
        logits=math.ceil(_under_way(config, rank))
        * (copies * tokens * columns * VALUE_BYTES[config.model.dtype] if has_head else 0),
    )


def _states(config: TrainingConfig, model: ModelPlan, param: Param) -> Memory:
    """A parameter, its gradient, and what the optimizer keeps of it."""
    optimizer = config.optimizer
    elements = math.prod(param.local_shape(model.topology.sizes))
    value_bytes = 4 if param.is_fp32 else VALUE_BYTES[config.model.dtype]
    if _is_by_rows(config, param):
        return _states_by_rows(config, model, param)
    # ZeRO-1 gives each of the ranks that have the same a slice of the flattened parameter.
    is_shared = optimizer.zero_stage == 1
    share = -(-elements // _replicas(config, param)) if is_shared else elements
    return Memory(
        weights=elements * value_bytes,
        gradients=elements * 4,
        masters=share * 4 if value_bytes < 4 else 0,
        moments=share * _num_moments(config, param) * 4,
    )


def _num_moments(config: TrainingConfig, param: Param) -> int:
    is_muon = isinstance(config.optimizer.optimizer_factory, Muon)
    return 1 if is_muon and is_hidden_matrix(param) else 2


def _replicas(config: TrainingConfig, param: Param) -> int:
    """Data-parallel ranks that have the same shard of a parameter."""
    layout = config.parallelism
    return layout.dp // layout.expert_parallel_size if "ep" in param.cuts else layout.dp


def _is_by_rows(config: TrainingConfig, param: Param) -> bool:
    """Whether ZeRO-3 shares a parameter out."""
    is_small = param.is_fp32
    return config.optimizer.zero_stage == 3 and not is_small and _replicas(config, param) > 1


def _states_by_rows(config: TrainingConfig, model: ModelPlan, param: Param) -> Memory:
    """The rows that the first of the ranks with the same keeps, in fp32 whatever the dtype."""
    rows, *width = param.local_shape(model.topology.sizes)
    share = 4 * -(-rows // _replicas(config, param)) * math.prod(width)
    in_fp32 = config.model.dtype == "float32"
    return Memory(
        weights=share if in_fp32 else 0,
        masters=0 if in_fp32 else share,
        gradients=share,
        moments=_num_moments(config, param) * share,
    )


def _gathered(blocks: Mapping[int | str, int], value_bytes: int) -> Memory:
    """What ZeRO-3 has of whole parameters at once: all beside the layers, and of those two.

    One computes while the next is gathered. Gradients are summed in fp32.

    Args:
        blocks: elements of each block of a rank.
    """
    layer = max((count for block, count in blocks.items() if isinstance(block, int)), default=0)
    beside = sum(count for block, count in blocks.items() if not isinstance(block, int))
    return Memory(
        weights=(beside + 2 * layer) * value_bytes,
        gradients=(beside + layer) * value_bytes + 4 * max(beside, layer),
    )


def _activations(
    config: TrainingConfig, model: ModelPlan, stages: Stages, rank: int, tokens: int
) -> int:
    layout = config.parallelism
    batch = MicroBatch(
        tokens=tokens,
        hidden_size=model.architecture.spec.hidden_size,
        value_bytes=VALUE_BYTES[config.model.dtype],
        tp=layout.tp,
        is_scattered=layout.tp_mode == "REDUCE_SCATTER",
        recomputes_layers=layout.recompute_layer,
        ep=layout.expert_parallel_size,
        packs_by_kv_head=names_of(model.architecture.family).packs_by_kv_head,
    )
    layers = [
        layer
        for layer, stage in zip(model.architecture.spec.layers, stages.layers, strict=True)
        if stage % layout.pp == rank
    ]
    kept = sum(map(batch.kept, layers))
    if stages.of("head") % layout.pp == rank:
        kept += batch.kept_at_end()
    # torch.distributed.pipelining has a buffer for each micro batch that a stage receives, and
    # for each gradient that comes back: every stage but the first has the former, every one but
    # the last the latter.
    num_stages = layout.pp * layout.chunks
    own = [stage for stage in range(num_stages) if stage % layout.pp == rank]
    received = sum((stage > 0) + (stage < num_stages - 1) for stage in own)
    received *= config.tokens.batch_accumulation_per_replica * batch.stream_bytes
    return math.ceil(kept * _under_way(config, rank)) + batch.working(layers) + received


def _under_way(config: TrainingConfig, rank: int) -> float:
    layout, count = config.parallelism, config.tokens.batch_accumulation_per_replica
    return in_flight(
        layout.pp_engine, rank=rank, pp=layout.pp, chunks=layout.chunks, num_micro_batches=count
    )


def _sum(one: Memory, other: Memory) -> Memory:
    second = asdict(other)
    return Memory(**{name: value + second[name] for name, value in asdict(one).items()})
