"""What a sweep runs for one operation: its cases, by the rule and by each candidate, in turns."""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.cases.case import Case, Setting
from benchmarks.gpu.cases.registry import cases_of
from benchmarks.gpu.context import Context
from benchmarks.gpu.harness import with_gradients
from benchmarks.gpu.launches import compiled_only
from benchmarks.gpu.ratios import disagreement, expected_of, works_of
from benchmarks.gpu.rows import Row, emit
from benchmarks.gpu.sweep import SWEPT
from benchmarks.gpu.timing import Times, beside
from nanotron_fast.kernels.runtime.tuning import Tuned, picking

# A candidate must be so much faster than the rule, or more where the rule's own times spread more.
NOISE = 0.02
# Kernels that Triton's tuner times by itself: what it finds is kept, and spares it the next time.
AUTOTUNED = {
    "attention_forward": ("attention.kernels.forward", "forward_kernel"),
    "attention_dq": ("attention.kernels.dq", "dq_kernel"),
    "attention_dkv": ("attention.kernels.dkv", "dkv_kernel"),
    "matmul_glu": ("matmul.kernels", "glu_kernel"),
    "matmul_rope": ("matmul.kernels", "rope_kernel"),
}

Key = dict[str, int]


def _cases(operation: str, context: Context) -> Iterator[Case]:
    """Those with the variant that is swept."""
    name, _, variant = SWEPT[operation]
    setting = Setting.of(context) if context.dry else Setting.of(context).to_sweep()
    return (case for case in cases_of(name, setting) if variant in case.variants)


def _picked(config: Tuned) -> AbstractContextManager[None]:
    return picking(lambda kind, _: config if kind is type(config) else None)


def asked(operation: str, call: Callable[[], Any]) -> tuple[type[Tuned], Key] | None:
    """The class and the key that a call asks for; None where it asks for none."""
    found: list[tuple[type[Tuned], Key]] = []

    def note(kind: type[Tuned], key: Key) -> None:
        if kind.operation == operation and (kind, key) not in found:
            found.append((kind, key))

    with picking(note):
        call()
    if len(found) > 1:
        raise ValueError(f"{operation}: a case asks for {[key for _, key in found]}, not one key")
    return found[0] if found else None


def is_faster(candidate: Times, rule: Times) -> bool:
    """By more than noise."""
    spread = (rule.p80_ms - rule.p20_ms) / rule.p50_ms
    return candidate.p50_ms * (1 + max(NOISE, spread)) < rule.p50_ms


def _timed(
    operation: str, case: Case, context: Context
) -> tuple[type[Tuned], Key, dict[Tuned, Times]] | None:
    """What a case asks for, and the times of the rule and then of each candidate that is right."""
    _, phase, variant = SWEPT[operation]
    works = works_of(case, case.variants[variant], context)[phase]
    if operation in AUTOTUNED:
        # It is to time this kind, or to read what it has on disk of it: of a kind that it remembers
        # it says nothing, and its times would be of another case.
        tuner = _tuner_of(operation)
        tuner.cache.clear()
        tuner.configs_timings = {}
    found = asked(operation, lambda: [call() for call in works()[:1]])
    if found is None:
        return None
    kind, key = found
    if operation in AUTOTUNED:
        return kind, key, _by_triton(kind, operation, context)
    expected, configs = expected_of(case), [kind.rule(**key)]
    about: Row = {"kind": "tune", "operation": operation, "variant": case.shape}
    for config in kind.candidates_for(key):
        try:
            with _picked(config):
                error = disagreement(case, variant, expected)
        except OutOfResources as does_not_fit:
            emit(about | {"ok": None, "note": f"{config}: {does_not_fit}"})
            continue
        except Exception:  # of one candidate; the others are still worth their time
            emit(about | {"ok": False, "error": f"{config}\n{_told()}"})
            continue
        if error <= case.tolerance:
            configs.append(config)
        else:
            emit(about | {"ok": False, "error": f"{config} is off by {error:.3g} of the norm"})
    del expected
    times = beside(works, [partial(_picked, config) for config in configs], context)
    return kind, key, dict(zip(configs, times, strict=True))


def _tuner_of(operation: str) -> Any:
    module, name = AUTOTUNED[operation]
    return getattr(importlib.import_module(f"nanotron_fast.kernels.{module}"), name)


def _by_triton(kind: type[Tuned], operation: str, context: Context) -> dict[Tuned, Times]:
    """What Triton's tuner has just timed, the fastest last; nothing where it has not.

    Without those that do not fit on this GPU, whose time is infinite.
    """
    timings = {} if context.dry else _tuner_of(operation).configs_timings
    finite = [item for item in timings.items() if math.isfinite(item[1][0])]
    ordered = sorted(finite, key=lambda item: -item[1][0])
    return {
        kind.of(config): Times(p20, p50, p80, "Triton's") for config, (p50, p20, p80) in ordered
    }


def _told() -> str:
    """The exception that is being handled, for a row."""
    return traceback.format_exc(limit=-3)[-1500:].strip()


def run(operation: str, variant: str, context: Context) -> None:
    """Emits a row for each case and configuration, and after each case one with the entries so far.

    The last of these is whole, where no case has failed.
    """
    total: dict[tuple[tuple[str, int], ...], list[dict[Tuned, Times]]] = {}
    is_whole = True

    def emit_entries(is_whole: bool) -> None:
        certain = operation in AUTOTUNED
        found = [_entries(dict(key), cases, is_certain=certain) for key, cases in total.items()]
        row: Row = {"kind": "tune", "operation": operation, "ok": True, "is_whole": is_whole}
        emit(row | {"entries": [entry for each in found for entry in each]})

    for case in _cases(operation, context):
        about: Row = {"kind": "tune", "operation": operation, "variant": case.shape}
        if not context.dry:
            torch.cuda.empty_cache()
        try:
            found = _timed(operation, case, context)
        except Exception:  # of one case; the others are still worth their time
            is_whole = False
            emit(about | {"ok": False, "error": _told()})
            continue
        if found is None or not found[2]:
            emit(about | {"ok": None, "note": "launches nothing that is tuned, on this path"})
            continue
        _, key, times = found
        total.setdefault(tuple(key.items()), []).append(times)
        first = next(iter(times.values()))
        for config, its in times.items():
            row = about | {"ok": True, "times_as_fast": round(first.p50_ms / its.p50_ms, 3)}
            emit(row | {"config": str(config), **its.row(), **key})
        emit_entries(is_whole=False)
    emit_entries(is_whole)


def _entries(key: Key, cases: list[dict[Tuned, Times]], *, is_certain: bool) -> Iterator[Row]:
    """The entry of a key whose best candidate is faster than the rule in one case, and slower in
    none; `is_certain` where there is no rule."""
    rule = next(iter(cases[0]))

    def factor(config: Tuned) -> float:
        return min(times[rule].p50_ms / times[config].p50_ms for times in cases)

    known = [config for config in cases[0] if all(config in times for times in cases)]
    best = max(known, key=factor)
    wins = any(is_faster(times[best], times[rule]) for times in cases) and factor(best) >= 1
    if is_certain or wins:
        yield {"key": key, "config": asdict(best), "times_as_fast": round(factor(best), 3)}


def precompile(operation: str, variant: str, context: Context) -> None:
    """Every candidate's kernels, into Triton's cache, where the run finds them."""
    torch.manual_seed(0)
    for case in _cases(operation, context):
        call = partial(with_gradients, case.variants[SWEPT[operation][2]], case.tensors())
        with compiled_only():
            found = asked(operation, call)
        if found is None or operation in AUTOTUNED:
            continue
        kind, key = found
        for config in kind.candidates_for(key):
            with _picked(config), compiled_only():
                call()
