"""Comparing two checkpoints, byte for byte, in any two formats and topologies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanotron_fast.checkpoints.logits import LogitsReport, OwnForward, compare_logits
from nanotron_fast.checkpoints.options import Options, VerifyChoices, takes
from nanotron_fast.checkpoints.plan.compare import ComparisonPlan, plan_comparison
from nanotron_fast.checkpoints.remote import running
from nanotron_fast.checkpoints.remote.mirror import mirrors_closed, shown
from nanotron_fast.checkpoints.remote.packages import require_store
from nanotron_fast.checkpoints.source import has_configuration, read, resolve, tensor_names
from nanotron_fast.checkpoints.stored import Checkpoint
from nanotron_fast.errors import ConfigError
from nanotron_fast.extras import require
from nanotron_fast.formats.dcp import is_dcp_checkpoint
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint, check_rival_bytes
from nanotron_fast.formats.patterns import unmatched
from nanotron_fast.moves import engine
from nanotron_fast.moves.engine import ProgressCallback
from nanotron_fast.moves.row import FILL

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor or a configuration key that is not the same."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What a comparison found. `casts` says which side's values were cast before comparing."""

    equal: bool
    tensors_compared: int
    differing: tuple[Difference, ...]
    casts: tuple[str, ...]
    bytes_compared: int
    logits: LogitsReport | None = None
    # Why logits were asked for and not run; None where they were, or were not asked for.
    no_logits: str | None = None
    warnings: tuple[str, ...] = ()
    # Tensors that were left out because the user asked for it.
    ignored: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The contract of `verify --json`."""
        document: dict[str, Any] = {
            "equal": self.equal,
            "tensors_compared": self.tensors_compared,
            "differing": [{"name": item.name, "reason": item.reason} for item in self.differing],
            "casts": list(self.casts),
        }
        if self.warnings:
            document["warnings"] = list(self.warnings)
        if self.ignored:
            document["ignored_tensors"] = list(self.ignored)
        if self.no_logits is not None:
            document["logits_not_run"] = self.no_logits
        if self.logits is not None:
            document["logits"] = {
                "equal": self.logits.equal,
                "max_difference": _finite(self.logits.max_difference),
                "max_magnitude": _finite(self.logits.max_magnitude),
                "tolerance": _finite(self.logits.tolerance),
                "num_tokens": self.logits.num_tokens,
                "num_same_argmax": self.logits.num_same_argmax,
                "argmax_agrees": self.logits.num_same_argmax == self.logits.num_tokens,
                "programs": list(self.logits.programs),
            }
        return document


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


@takes(VerifyChoices)
@mirrors_closed()
def verify(
    a: str | Path,
    b: str | Path,
    *,
    logits: bool = False,
    workers: int | None = None,
    on_plan: Callable[[int], None] | None = None,
    on_progress: ProgressCallback | None = None,
    own_forward: OwnForward | None = None,
    **choices: Unpack[VerifyChoices],
) -> Verification:
    """Compares every tensor of two checkpoints, and what their configurations say of the model.

    Where dtypes differ, the wider side's values are cast to the other's dtype first. Vocabulary
    padding counts as equal when it is zero. Of two Nanotron checkpoints, `rope_interleaved` speaks
    of those whose configuration does not.

    Args:
        a, b: directories, Hub ids or URLs, each in any of the formats. Logits take no URLs.
        logits: also run both, and compare what they compute: a Hugging Face side in transformers, a
            Nanotron side by Nanotron's own rules in plain torch, or by this package's models where
            it is of this package's own class.
        workers: threads; by default one for each core, 16 at most.
        on_plan: called with the number of bytes to compare.
        on_progress: called now and then with the bytes compared so far.
        own_forward: what runs the latter; set in `nanotron_fast.verify`.
        choices: the options at the end, each a field of `checkpoints.options.Options`.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError, OSError: a side cannot be read.
        MissingPackageError: what runs models, or reads from a store, is not installed.
    """
    if logits:
        require("logits", "--logits")
    require_store(a, b)
    options = Options.of(choices, VerifyChoices)
    roots = resolve(a, takes_urls=not logits), resolve(b, takes_urls=not logits)
    whole = _read(roots, options.like)
    for root, each in zip(roots, whole, strict=True):
        if logits and isinstance(each, HfCheckpoint) and each.format == "dcp":
            raise ConfigError(
                f"--logits: {root} is of torch.distributed.checkpoint, which is not run: convert "
                "it with --to hf, and compare that"
            )
    names = [name for each in whole for name in tensor_names(each)]
    unused = unmatched(names, options.ignore_tensors)
    first, second = (each.without(options.ignore_tensors) for each in whole)
    for side in (first, second):
        if isinstance(side, HfCheckpoint):
            check_rival_bytes(side)
    # It is said of a folder of DCP, and not of a Nanotron checkpoint beside it.
    options = replace(options, like=None)
    plan = plan_comparison(first, second, options)
    if on_plan is not None:
        on_plan(plan.num_bytes)
    found = running.compare(
        plan.files.paths,
        plan.files.paths,
        [named.move for named in plan.moves],
        workers=engine.default_workers() if workers is None else workers,
        on_progress=on_progress,
    )
    differing = {**plan.differing, **_reasons(plan, found)}
    report = None
    if logits and plan.cannot_run is None:
        report = compare_logits(
            *roots, options, has_casts=plan.has_lossy_casts, own_forward=own_forward
        )
    return Verification(
        equal=not differing and (report is None or report.equal),
        tensors_compared=plan.num_tensors,
        differing=tuple(Difference(name, shown(reason)) for name, reason in differing.items()),
        casts=tuple(plan.casts),
        bytes_compared=plan.num_bytes,
        logits=report,
        no_logits=plan.cannot_run if logits else None,
        warnings=tuple(map(shown, (*plan.warnings, *unused))),
        ignored=tuple(dict.fromkeys((*first.ignored, *second.ignored))),
    )


def _read(roots: Sequence[Path], like: Path | None) -> list[Checkpoint]:
    """Both sides. A folder of DCP without a configuration is seen as what the other side is."""
    if like is not None and not any(map(is_dcp_checkpoint, roots)):
        raise ConfigError("--like: it has no meaning where no side is a checkpoint of DCP")
    found: list[Checkpoint] = []
    for root, other in zip(roots, reversed(roots), strict=True):
        seen_as = like
        if like is None and not has_configuration(root) and has_configuration(other):
            seen_as = other
        found.append(read(root, like=seen_as))
    return found


def _reasons(plan: ComparisonPlan, found: list[tuple[int, int, int]]) -> dict[str, str]:
    """For each tensor that differs, by how much and where."""
    totals: dict[str, int] = {}
    for named in plan.moves:
        totals[named.hf_name] = totals.get(named.hf_name, 0) + named.move.num_elements
    counts: dict[str, int] = {}
    places: dict[str, str] = {}
    for index, count, offset in found:
        named = plan.moves[index]
        name = named.hf_name
        if named.move.source == FILL:
            name = f"{name} (padding)"
            totals[name] = totals.get(name, 0) + named.move.num_elements
        counts[name] = counts.get(name, 0) + count
        places.setdefault(name, f"byte {offset} of {plan.files.paths[named.move.destination]}")
    return {
        name: f"{count} of {totals[name]} elements differ, the first at {places[name]}"
        for name, count in counts.items()
    }
