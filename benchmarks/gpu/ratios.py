"""Times the variants of a case, each held to the reference first: what is wrong gets no time."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.agreement import error_of
from benchmarks.gpu.cases.case import Case, Setting
from benchmarks.gpu.context import Context
from benchmarks.gpu.harness import as_list, random_gradients, with_gradients
from benchmarks.gpu.launches import counted
from benchmarks.gpu.rows import Row, emit
from benchmarks.gpu.timing import Times, Work, measure, num_sets

Function = Callable[..., Any]


def disagreement(case: Case, name: str, expected: Sequence[Tensor]) -> float:
    """The largest relative error of outputs and gradients, in norm."""
    torch.manual_seed(0)
    results = with_gradients(case.variants[name], case.tensors())
    if len(results) != len(expected):
        return float("inf")
    pairs = zip(results, expected, strict=True)
    return max(error_of(mine.float(), reference.float()) for mine, reference in pairs)


def expected_of(case: Case) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        t.detach().clone()
        for t in with_gradients(next(iter(case.variants.values())), case.tensors())
    ]


def works_of(
    case: Case, function: Function, context: Context
) -> dict[str, Callable[[], list[Work]]]:
    """Phase -> what makes its calls: forward and, of what has a gradient, backward and both."""
    tensors = case.tensors()
    sets = [tensors, *(case.tensors() for _ in range(num_sets(tensors, context) - 1))]
    places = [place for place, t in enumerate(tensors) if t.requires_grad]
    del tensors

    def gradient(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: list[Tensor]) -> Any:
        leaves = [inputs[place] for place in places]
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)

    def both(inputs: Sequence[Tensor], grads: list[Tensor]) -> Any:
        return with_gradients(function, inputs, grads)

    def gradients() -> list[Tensor]:
        return random_gradients([t for t in as_list(function(*sets[0])) if t.requires_grad])

    def forwards() -> list[Work]:
        return [partial(function, *inputs) for inputs in sets]

    def backwards() -> list[Work]:
        grads = gradients()
        outputs = [as_list(function(*inputs)) for inputs in sets]
        return [partial(gradient, outs, s, grads) for outs, s in zip(outputs, sets, strict=True)]

    def boths() -> list[Work]:
        grads = gradients()
        return [partial(both, inputs, grads) for inputs in sets]

    if not places:
        return {"forward": forwards}
    return {"forward": forwards, "backward": backwards, "forward + backward": boths}


def _phases(case: Case, function: Function, context: Context) -> Iterator[tuple[str, Times]]:
    """forward and backward, or both as one, each with its times."""
    works = works_of(case, function, context)
    for phase in ("forward + backward",) if case.is_joint else ("forward", "backward"):
        if phase in works:
            yield phase, measure(works[phase], context)


def _floors(case: Case) -> dict[str, tuple[str, int]]:
    """Phase -> the unit of its rate, and how many bytes or FLOPs it takes at least."""
    if case.bytes_forward is not None:
        unit, forward, backward = "gb_per_s", case.bytes_forward, case.bytes_backward
    else:
        unit, forward, backward = "tflop_per_s", case.flops_forward or 0, case.flops_backward
    return {
        "forward": (unit, forward),
        "backward": (unit, backward or 0),
        "forward + backward": (unit, forward + (backward or 0)),
    }


def _rate(times: Times, unit: str, floor: int, context: Context) -> Row:
    per_second = floor / (times.p50_ms * 1e-3)
    rate = per_second / (1e9 if unit == "gb_per_s" else 1e12)
    row: Row = {unit: round(rate, 6 if context.dry else 1)}
    ceiling = context.ceilings.get(
        "copy_gb_per_s" if unit == "gb_per_s" else "matmul_tflop_per_s", 0.0
    )
    if ceiling:
        row["fraction_of_ceiling"] = round(rate / ceiling, 4)
    return row


def _is_chosen(name: str, case: Case, chosen: str) -> bool:
    """Whether a variant belongs to what `rows_of` was asked for."""
    if not chosen:
        return True
    names = [*case.variants, *case.absent]
    ours = next((each for each in names if each.startswith("ours")), "")
    return (name in (names[0], ours, *case.unlike)) == (chosen == "ours")


def rows_of(case: Case, context: Context, chosen: str = "") -> Iterator[Row]:
    """A row for each variant and phase, or one that says why it has none.

    `chosen` is "ours" for the reference, the first of ours and what only stands for comparison,
    "others" for all that this leaves.
    """
    about: Row = {"kind": "ratio", "operation": case.operation, "shape": case.shape}
    expected = expected_of(case)
    first = next(iter(case.variants))
    floors, reference = _floors(case), {}
    for name, function in case.variants.items():
        is_chosen = _is_chosen(name, case, chosen)
        if not is_chosen and name != first:  # the reference is timed again: all is beside it
            continue
        row = about | {"variant": name}
        try:
            with counted() as kernels:
                error = 0.0 if name in case.unlike else disagreement(case, name, expected)
            row["path"] = "triton" if kernels else case.paths.get(name, "torch")
            if not error <= case.tolerance:
                wrong = f"off by {error:.3g} of the norm, allowed {case.tolerance:.3g}: not timed"
                yield row | {"ok": False, "error": wrong}
                continue
            for phase, times in _phases(case, function, context):
                if name == first:
                    reference[phase] = times.p50_ms
                timed = row | {
                    "ok": True,
                    "phase": phase,
                    **times.row(),
                    **_rate(times, *floors[phase], context),
                }
                if phase in reference:
                    timed["times_as_fast"] = round(reference[phase] / times.p50_ms, 3)
                if is_chosen:
                    yield timed
        except Exception:  # one variant, a peer's perhaps; the others are still worth their time
            if is_chosen:
                yield row | {"ok": False, "error": traceback.format_exc(limit=-3)[-1500:]}
        if not context.dry:
            torch.cuda.empty_cache()
    for name, reason in case.absent.items():
        if _is_chosen(name, case, chosen):
            yield about | {"variant": name, "ok": None, "note": reason}


def precompile(operation: str, variant: str, context: Context) -> None:
    """What torch.compile makes of the cases, into Inductor's cache, where the timings find it."""
    from benchmarks.gpu.cases.registry import cases_of

    for case in cases_of(operation, Setting.of(context)):
        for name in filter("torch.compile".__eq__, case.variants):
            with_gradients(case.variants[name], case.tensors())


def run(operation: str, variant: str, context: Context) -> None:
    """Emits the rows of an operation: of its first case "ours" or "others", or of "case N"."""
    from benchmarks.gpu.cases.registry import cases_of

    is_first = not variant.startswith("case ")
    place = 0 if is_first else int(variant.removeprefix("case "))
    case = next(itertools.islice(cases_of(operation, Setting.of(context)), place, None))
    num_rows = 0
    for row in rows_of(case, context, variant if is_first else ""):
        emit(row)
        num_rows += 1
    if num_rows == 0:
        note = "nothing to compare it with here"
        about: Row = {"kind": "ratio", "operation": operation, "shape": case.shape}
        emit(about | {"variant": variant, "ok": None, "note": note})
