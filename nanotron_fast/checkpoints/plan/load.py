"""Planning the way from a checkpoint, in either format, into the tensors of one rank."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.plan.intersection import plan_moves
from nanotron_fast.checkpoints.plan.sides import piece_of
from nanotron_fast.checkpoints.stored import Checkpoint, HfModel, check_divides, some, stored_model
from nanotron_fast.errors import (
    ConfigError,
    TopologyError,
    UnsupportedModelError,
)
from nanotron_fast.families.parts import Param, Part, Sizes
from nanotron_fast.families.refusals import (
    check_experts,
    check_kv_heads,
    check_model,
    choose_class,
    target_of,
)
from nanotron_fast.formats.nanotron.stages import Stages
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.pieces import Piece
from nanotron_fast.moves.plan import MovePlan, OutputFile

# The name that a tied head has in a module; no file has it.
HEAD = "model.lm_head.pp_block.weight"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is to be filled. `memory` tells apart those that do not share it."""

    shape: tuple[int, ...]
    dtype: Dtype
    memory: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a rank reads. A move's destination is the position of a tensor's name in `names`."""

    transfer: MovePlan
    names: tuple[str, ...]
    num_tensors: int
    warnings: tuple[str, ...] = ()


class MemoryTarget:
    """The tensors of one rank, each from its first byte."""

    def __init__(self, tensors: Mapping[str, TensorSpec], sizes: Sizes, ranks: Sizes) -> None:
        self.sizes = sizes
        self.ranks = ranks
        self._places = {name: (i, spec.dtype) for i, (name, spec) in enumerate(tensors.items())}

    def pieces(self, param: Param, part: Part) -> list[Piece]:
        file, dtype = self._places[param.name]
        if not param.has(part, self.sizes, self.ranks):
            return []
        return [piece_of(param.share(part, self.sizes, self.ranks), file, 0, dtype)]


class _Source:
    """A stored model, and its parameters as they shall be."""

    def __init__(
        self, checkpoint: Checkpoint, options: Options, rope_interleaved: bool | None
    ) -> None:
        self.model = model = stored_model(checkpoint, options)
        target = options.target
        if isinstance(model, HfModel):
            if options.rope_interleaved:
                raise ConfigError(
                    f"stored_rope_interleaved: {checkpoint.root} is a Hugging Face checkpoint, "
                    "where q and k always lie in halves"
                )
            target = target_of(model.family, options.target)
            with model.judged():
                self.model_class = choose_class(
                    model.family, model.spec, options.model_class, target, tp=options.topology.tp
                )
            version = options.checkpoint_version or "1.5"
            is_old = version == "1.2" and self.model_class.rotates_neighbours_in_1_2
            shall = is_old if rope_interleaved is None else rope_interleaved
            with model.judged():
                check_model(
                    model.family,
                    model.spec,
                    self.model_class,
                    target=target,
                    version=version,
                    rope_interleaved=shall,
                )
        else:
            self.model_class = model.model_class
            shall = model.is_interleaved if rope_interleaved is None else rope_interleaved
        self.padded_vocab = model.padded_vocab_size
        multiple = options.pad_vocab_to_multiple_of
        if multiple is not None:
            self.padded_vocab = math.ceil(model.spec.vocab_size / multiple) * multiple
        has_pairs = model.is_interleaved != shall
        self.stored = model.params(has_rope_pairs=has_pairs)
        # In memory this package's models have copies, whatever class the checkpoint is of.
        copies_kv_heads = self.model_class.copies_kv_heads or target == "nanotron-fast"
        self.params = model.params(
            vocab_size=self.padded_vocab,
            rope_interleaved=shall,
            has_rope_pairs=has_pairs,
            copies_kv_heads=copies_kv_heads,
        )
        if not copies_kv_heads:
            check_kv_heads(
                self.params,
                self.model_class,
                model.spec,
                options.topology.tp,
                way='this package\'s models have them (target="nanotron-fast")',
            )

    def check(self) -> None:
        """Holds every tensor to the configuration, those of other ranks too. CheckpointError."""
        self.model.check_leftovers(self.model.hold(self.stored))


def plan_load(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorSpec],
    rank: int,
    options: Options,
    *,
    rope_interleaved: bool | None = None,
    blocks: Collection[int | str] | None = None,
) -> LoadPlan:
    """Plans how one rank's tensors are filled, every byte of them exactly once.

    `rope_interleaved` is the layout in memory, that of `options` what a Nanotron checkpoint has.
    `blocks`: whose tensors they are, where that is not Nanotron's assignment to stages.
    Raises CheckpointError, ConfigError, UnsupportedModelError where the checkpoint makes no sense,
    TopologyError where the tensors are not those of the rank.
    """
    options.reject_for("nanotron")
    topology = options.topology
    num_ranks = topology.tp * topology.pp * topology.ep
    if not 0 <= rank < num_ranks:
        raise TopologyError(f"rank {rank}: {topology} has ranks 0 to {num_ranks - 1}")
    source = _Source(checkpoint, options, rope_interleaved)
    source.check()
    replica, tp_rank = divmod(rank, topology.tp)
    ep_rank, stage = divmod(replica, topology.pp)
    check_experts(source.model_class, source.model.spec, topology.ep)
    owned = _blocks_of_stage(source, topology, stage) if blocks is None else frozenset(blocks)
    check_divides(source.params, topology)
    mine, optional = _params_of(source, owned)
    shapes = {name: param.local_shape(topology.sizes) for name, (param, _) in mine.items()}
    _check_tensors(tensors, shapes, optional, f"rank {rank} of {topology}")

    filled = _without_aliases(tensors, optional)
    reader = source.model.reader()
    moves = tuple(
        named.move
        for named in plan_moves(
            [mine[name][0] for name in filled],
            reader,
            MemoryTarget(filled, topology.sizes, {"tp": tp_rank, "ep": ep_rank}),
            source_params=[mine[name][1] for name in filled],
        )
    )
    for move in moves:
        if move.source_dtype is not move.destination_dtype and Dtype.F64 in (
            move.source_dtype,
            move.destination_dtype,
        ):
            raise UnsupportedModelError(
                f"{list(filled)[move.destination]}: {move.source_dtype.name} in the checkpoint, "
                f"{move.destination_dtype.name} in memory; F64 is not cast"
            )
    outputs = tuple(OutputFile(name, b"", spec.num_bytes) for name, spec in filled.items())
    transfer = MovePlan(tuple(reader.files.paths), outputs, moves)
    transfer.check()
    return LoadPlan(transfer, tuple(filled), len(tensors), tuple(source.model.warnings))


def _blocks_of_stage(source: _Source, topology: Topology, stage: int) -> frozenset[int | str]:
    """What a stage owns by Nanotron's own assignment. Raises TopologyError."""
    spec = replace(source.model.spec, vocab_size=source.padded_vocab)
    stages = Stages(spec, source.model_class, topology)
    blocks = ("embedding", *range(spec.num_layers), "norm", "head")
    return frozenset(block for block in blocks if stages.of(block) == stage)


def _params_of(
    source: _Source, owned: Collection[int | str]
) -> tuple[dict[str, tuple[Param, Param]], set[str]]:
    """The parameters of blocks, as they shall be and as they are stored; and the optional ones.

    A tied head is the embedding under another name: without the embedding a tensor of its own, and
    beside it the same one, which a module lists once.
    """
    pairs = list(zip(source.params, source.stored, strict=True))
    mine = {pair[0].name: pair for pair in pairs if pair[0].block in owned}
    optional: set[str] = set()
    if source.model.spec.tie_word_embeddings and "head" in owned:
        embedding, stored = next(pair for pair in pairs if pair[0].block == "embedding")
        if embedding.name in mine:
            optional = {HEAD}
        mine[HEAD] = replace(embedding, name=HEAD), stored
    return mine, optional


def _check_tensors(
    tensors: Mapping[str, TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Collection[str],
    where: str,
) -> None:
    """Holds the given tensors to what a rank owns. Raises TopologyError, naming what differs."""
    problems: list[str] = []
    missing = [name for name in shapes if name not in tensors and name not in optional]
    if missing:
        problems.append(f"{len(missing)} of its tensors are missing: {some(missing)}")
    unknown = [name for name in tensors if name not in shapes]
    if unknown:
        problems.append(f"{len(unknown)} are not its own: {some(unknown)}")
    wrong = [
        f"{name} is {list(spec.shape)} and should be {list(shapes[name])}"
        for name, spec in tensors.items()
        if name in shapes and spec.shape != shapes[name]
    ]
    if wrong:
        problems.append(f"{len(wrong)} have another shape: {some(wrong)}")
    if problems:
        raise TopologyError(f"{where}: {'; '.join(problems)}")


def _without_aliases(
    tensors: Mapping[str, TensorSpec], optional: Collection[str]
) -> dict[str, TensorSpec]:
    """Leaves out a tied head that is the embedding's own tensor: it is filled under that name.

    Raises TopologyError where other names share a tensor.
    """
    owners: dict[int, str] = {}
    for name, spec in sorted(tensors.items(), key=lambda item: item[0] in optional):
        owner = owners.setdefault(spec.memory, name)
        if owner != name and name not in optional:
            raise TopologyError(f"{owner} and {name} share memory, and are two in the model")
    return {name: spec for name, spec in tensors.items() if owners[spec.memory] == name}
