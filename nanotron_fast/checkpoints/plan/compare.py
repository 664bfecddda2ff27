"""Planning the comparison of two checkpoints, in any two formats and topologies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.plan.intersection import NamedMove, plan_moves, plan_padding
from nanotron_fast.checkpoints.plan.sides import TIED_HEAD, Files, HfSource, NanotronSource
from nanotron_fast.checkpoints.stored import Checkpoint, stored_model
from nanotron_fast.errors import CheckpointError, PartialCheckpointError, UnsupportedModelError
from nanotron_fast.families import Family
from nanotron_fast.families.parts import Param
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint
from nanotron_fast.formats.nanotron.checkpoint import NanotronCheckpoint
from nanotron_fast.model.spec import COMPUTED, STRUCTURE, ModelSpec, differing_layer
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.row import FILL
from nanotron_fast.moves.scales import Quantised


@dataclass(slots=True)
class ComparisonPlan:
    """What to compare. Files of both checkpoints are numbered together."""

    files: Files = field(default_factory=Files)
    moves: list[NamedMove] = field(default_factory=list)
    # Found from headers alone: tensor or config key, and what is different about it.
    differing: dict[str, str] = field(default_factory=dict)
    casts: list[str] = field(default_factory=list)
    has_lossy_casts: bool = False
    num_tensors: int = 0
    warnings: list[str] = field(default_factory=list)
    # Why the two cannot be run on the same tokens: they are not of one structure, or incomplete.
    cannot_run: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that will be compared."""
        return sum(
            named.move.num_elements * named.move.destination_dtype.itemsize for named in self.moves
        )


class _OtherDtype(CheckpointError):
    """Dtypes that are not compared. Both sides are whole all the same."""


class _Model:
    """One side of a comparison. Its `spec` may have less vocabulary than the stored one."""

    def __init__(self, checkpoint: Checkpoint, label: str, options: Options) -> None:
        self.label = label
        self.stored = stored_model(checkpoint, options)
        self.checkpoint = checkpoint
        self.spec = self.stored.spec
        self.side = self.stored.reader()
        self.warnings = [f"{label}: {warning}" for warning in self.stored.all_warnings()]

    def params(self, family: Family, spec: ModelSpec, has_rope_pairs: bool) -> list[Param]:
        return family.params(
            spec,
            padded_vocab_size=self.stored.padded_vocab_size,
            rope_interleaved=self.stored.is_interleaved,
            has_rope_pairs=has_rope_pairs,
            tensors_interleaved=self.stored.tensors_interleaved,
            copies_kv_heads=self.stored.copies_kv_heads,
        )

    def dtype(self, param: Param) -> Dtype:
        """The widest dtype of what makes a parameter."""
        if isinstance(self.side, NanotronSource):
            return self.side.dtype(param)
        return max((self.side.dtype(part) for part in param.parts), key=lambda d: d.itemsize)

    def quantised(self, param: Param) -> Quantised | None:
        """The element type of a parameter of one part, where it is quantised."""
        if isinstance(self.side, NanotronSource):
            return None
        return self.side.quantised(param.parts[0])


def plan_comparison(
    a: Checkpoint,
    b: Checkpoint,
    options: Options,
) -> ComparisonPlan:
    """Plans the comparison of every tensor.

    `options.rope_interleaved` overrules what the configuration of a Nanotron side says; where both
    are Nanotron's, it holds for those whose configuration says nothing.
    Raises CheckpointError, ConfigError, UnsupportedModelError where a checkpoint makes no sense.
    """
    first, second = _models(a, b, options)
    plan = ComparisonPlan(warnings=[*first.warnings, *second.warnings])
    for name in COMPUTED:
        left, right = (getattr(model.spec, name) for model in (first, second))
        if left == right:
            continue
        if name == "layers":
            # Where a property of all layers shows it, that says more than the layers do.
            if plan.differing:
                continue
            name, left, right = differing_layer(first.spec, second.spec) or (name, left, right)
        plan.differing[f"config: {name}"] = f"{left!r} in A, {right!r} in B"
    # With any of these different, there is nothing to compare tensor by tensor.
    structure = [name for name in STRUCTURE if f"config: {name}" in plan.differing]
    if structure:
        plan.cannot_run = f"the two are of different structure ({', '.join(structure)})"
        return plan
    _plan_tensors(plan, first, second)
    for model in (first, second):
        _plan_tied_copy(plan, model)
    for model, other in ((first, "B"), (second, "A")):
        for name in model.stored.leftovers(model.side):
            plan.differing.setdefault(name, f"is in {model.label} alone, not in {other}")
            plan.cannot_run = plan.cannot_run or f"{name} is in {model.label} alone"
    return plan


def _models(a: Checkpoint, b: Checkpoint, options: Options) -> tuple[_Model, _Model]:
    """Both sides, a Nanotron one seen as what the Hugging Face one says it is."""
    if isinstance(a, HfCheckpoint):
        first = _Model(a, "A", options)
        return first, _beside(b, "B", first, options)
    if isinstance(a, NanotronCheckpoint) and isinstance(b, NanotronCheckpoint):
        return _nanotron_models(a, b, options)
    second = _Model(b, "B", options)
    return _beside(a, "A", second, options), second


def _nanotron_models(
    a: NanotronCheckpoint, b: NanotronCheckpoint, options: Options
) -> tuple[_Model, _Model]:
    """Both sides, where only one may say where its padding begins."""

    def own(checkpoint: NanotronCheckpoint) -> Options:
        if "rope_interleaved" in checkpoint.model_config:
            return replace(options, rope_interleaved=None)
        return options

    second = _Model(b, "B", own(b))
    first = _beside(a, "A", second, own(a))
    if first.spec.vocab_size < second.spec.vocab_size:
        second.spec = replace(second.spec, vocab_size=first.spec.vocab_size)
    return first, second


def _beside(checkpoint: Checkpoint, label: str, other: _Model, options: Options) -> _Model:
    """A side whose family and vocabulary are the other's, where a Nanotron one leaves them open."""
    if isinstance(checkpoint, HfCheckpoint):
        return _Model(checkpoint, label, options)
    if isinstance(other.checkpoint, HfCheckpoint) and options.family is None:
        try:
            model = _Model(checkpoint, label, replace(options, family=other.stored.family.name))
        except UnsupportedModelError:  # its class cannot hold that family: it is something else
            model = _Model(checkpoint, label, options)
    else:
        model = _Model(checkpoint, label, options)
    vocab_size = min(other.spec.vocab_size, model.stored.padded_vocab_size)
    if isinstance(other.checkpoint, HfCheckpoint) or model.spec.vocab_size > vocab_size:
        model.spec = replace(model.spec, vocab_size=vocab_size)
    return model


def _plan_tensors(plan: ComparisonPlan, first: _Model, second: _Model) -> None:
    has_rope_pairs = any(
        model.stored.is_interleaved or model.stored.tensors_interleaved for model in (first, second)
    )
    left_params = first.params(first.stored.family, first.spec, has_rope_pairs)
    right_params = second.params(first.stored.family, first.spec, has_rope_pairs)
    casts: Counter[tuple[str, Dtype | Quantised, Dtype]] = Counter()
    compared: set[str] = set()
    for left, right in zip(left_params, right_params, strict=True):
        for left_part, right_part in zip(left.parts, right.parts, strict=True):
            name = left_part.name
            try:
                cast = _plan_part(
                    plan,
                    (first, replace(left, parts=(left_part,))),
                    (second, replace(right, parts=(right_part,))),
                )
            except PartialCheckpointError:  # what was not asked for differs from nothing
                raise
            except CheckpointError as error:
                plan.differing[name] = str(error)
                if not isinstance(error, _OtherDtype):
                    plan.cannot_run = plan.cannot_run or str(error)
                continue
            if cast is not None and name not in compared:
                casts[cast] += 1
                # A router is fp32 in Nanotron without having gained anything by it.
                plan.has_lossy_casts |= not left.is_fp32
            compared.add(name)
    _plan_copies(plan, first, left_params)
    _plan_copies(plan, second, right_params)
    plan.num_tensors = len(compared)
    plan.casts = [
        f"{label} {source.short_name} -> {destination.short_name} ({count} tensors)"
        for (label, source, destination), count in casts.items()
    ]


def _plan_part(
    plan: ComparisonPlan, left: tuple[_Model, Param], right: tuple[_Model, Param]
) -> tuple[str, Dtype | Quantised, Dtype] | None:
    """Adds the moves that would make the narrower side's values from the wider side's.

    A quantised side becomes what the other one is, however narrow its codes are. Each side comes
    with a parameter of one part. Returns the cast: whose values, from, to.
    """
    left_dtype, right_dtype = left[0].dtype(left[1]), right[0].dtype(right[1])
    left_codes, right_codes = left[0].quantised(left[1]), right[0].quantised(right[1])
    if left_codes and right_codes:
        raise _OtherDtype(
            f"{left_codes.short_name} in {left[0].label}, {right_codes.short_name} in "
            f"{right[0].label}: two quantised tensors are not compared; convert one of the models"
        )
    is_narrower = left_dtype.itemsize < right_dtype.itemsize
    if right_codes or (is_narrower and not left_codes):
        left, right = right, left
        left_dtype, right_dtype = right_dtype, left_dtype
    (source, source_param), (destination, param) = left, right
    if Dtype.F64 in (left_dtype, right_dtype) and left_dtype is not right_dtype:
        raise _OtherDtype(
            f"{left_dtype.short_name} in {source.label}, {right_dtype.short_name} in "
            f"{destination.label}"
        )
    for named in plan_moves([param], source.side, destination.side, source_params=[source_param]):
        _add(plan, named, source.side, destination.side)
    for named in plan_padding([source_param], [param], source.side, destination.side):
        _add(plan, named, source.side, source.side)
    codes = left_codes or right_codes
    if codes:
        return source.label, codes, right_dtype
    return None if left_dtype is right_dtype else (source.label, left_dtype, right_dtype)


def _plan_tied_copy(plan: ComparisonPlan, model: _Model) -> None:
    """A tied head that a file holds as well must be what it is tied to."""
    try:
        copies = model.stored.tied_copies(model.side)
    except CheckpointError as error:
        plan.differing[TIED_HEAD] = str(error)
        return
    for copy in copies:
        _add(plan, copy.named, model.side, model.side)


def _plan_copies(plan: ComparisonPlan, model: _Model, params: Sequence[Param]) -> None:
    """What several ranks of a side have copies of must be the same: only the first is compared."""
    if isinstance(model.side, NanotronSource):
        sound = (
            param
            for param in params
            if not any(part.name in plan.differing for part in param.parts)
        )
        for copy in model.side.copies(sound):
            name = f"{copy.named.hf_name} ({copy.where} in {model.label})"
            _add(plan, replace(copy.named, hf_name=name), model.side, model.side)


def _add(
    plan: ComparisonPlan,
    named: NamedMove,
    source: HfSource | NanotronSource,
    destination: HfSource | NanotronSource,
) -> None:
    scales = named.move.scales
    if scales is not None:
        scales = scales._replace(source=_number(plan, source, scales.source))
    move = replace(
        named.move,
        source=_number(plan, source, named.move.source),
        destination=_number(plan, destination, named.move.destination),
        scales=scales,
    )
    plan.moves.append(replace(named, move=move))


def _number(plan: ComparisonPlan, side: HfSource | NanotronSource, file: int) -> int:
    """A file's number among those of both sides."""
    return FILL if file == FILL else plan.files.number(side.files.paths[file])
