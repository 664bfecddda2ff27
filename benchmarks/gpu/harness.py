"""How an operation is held to its reference: at once, in a graph, under torch.compile, and twice.

The reference is computed in fp64 (or fp32 where that takes too much memory) from the same inputs;
`agreement` says how near each result must come to it. NaN never passes.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.agreement import excess
from benchmarks.gpu.context import Context
from benchmarks.gpu.launches import compiled_only, counted, shard_asked_for
from benchmarks.gpu.rows import Row, emit

_POISON_BYTES = 1 << 28


class LeftOut(Exception):
    """A case that this machine, or this library, does not have."""


@dataclass
class Check:
    """One operation at one shape.

    `ours` and `reference` are functions of the inputs, which they leave as they are; the reference
    gets them in `wide`. Inputs that require a gradient are differentiated in both.
    """

    inputs: list[Tensor]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    # By the dtype of a result, for what is rounded on its way; see `agreement` for the others.
    tolerances: Mapping[torch.dtype, float] = field(default_factory=dict)
    wide: torch.dtype = torch.float64
    # Of what is no kernel of ours: a library's name. A check without one must launch a kernel.
    path: str = ""
    # Why it cannot be captured in a graph, or compiled; empty where it can.
    not_captured: str = ""
    not_compiled: str = ""


Builder = Callable[[str, Context], Check]


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def poison(device: torch.device) -> None:
    """Leaves NaN in memory that will be handed out again, so that what is not written shows."""
    num_bytes = _POISON_BYTES if device.type == "cuda" else 1 << 16
    for size in (num_bytes, num_bytes >> 4, 1 << 14):
        torch.full((size // 4,), float("nan"), device=device)


def random_gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same for the same shapes: bf16 numbers, in the outputs' dtypes."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [
        torch.randn(out.shape, generator=generator, device=out.device).bfloat16().to(out.dtype)
        for out in outputs
    ]


def with_gradients(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Outputs, then the gradients of the inputs that require one; `grads` by default are random."""
    outputs = as_list(function(*inputs))
    wanted = [t for t in inputs if t.requires_grad]
    ways = [out for out in outputs if out.requires_grad]
    if not wanted or not ways:
        return outputs
    grads = random_gradients(ways) if grads is None else grads
    return [*outputs, *torch.autograd.grad(ways, wanted, grads, allow_unused=True)]


def references_of(check: Check) -> list[Tensor]:
    wide = [
        t.detach().to(check.wide).requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in check.inputs
    ]
    return with_gradients(check.reference, wide)


def compare(check: Check, results: Sequence[Tensor]) -> Row:
    """ok, and the error that is nearest to what is allowed, with the name of what has it."""
    expected = references_of(check)
    if len(results) != len(expected):
        return {"ok": False, "error": f"{len(results)} results, {len(expected)} expected"}
    num_outputs = len(expected) - sum(t.requires_grad for t in check.inputs)
    found = []
    for place, (mine, reference) in enumerate(zip(results, expected, strict=True)):
        kind = f"output {place}" if place < num_outputs else f"gradient {place - num_outputs}"
        error, allowed, wrong = excess(mine, reference, check.tolerances)
        found.append((bool(wrong), error / (allowed or 1.0), kind, error, allowed, wrong))
    is_wrong, _, kind, error, allowed, wrong = max(found)
    row: Row = {"ok": not is_wrong, "worst_error": error, "of": kind, "tolerance": allowed}
    return row | ({"error": f"{kind} {wrong}"} if is_wrong else {})


def correct(check: Check, context: Context) -> Row:
    poison(context.device)
    return compare(check, with_gradients(check.ours, check.inputs))


def captured(check: Check, context: Context) -> Row:
    """A graph of forward and backward, replayed on inputs that it was not captured with."""
    inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in check.inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is tuned or laid out once is so before
        ways = [out for out in as_list(check.ours(*inputs)) if out.requires_grad]
        grads = random_gradients(ways) if ways else []
        del ways
        with_gradients(check.ours, inputs, grads)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = with_gradients(check.ours, inputs, grads)
    with torch.no_grad():
        for static in inputs:
            if static.is_floating_point():
                static.copy_(static.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    check.inputs = inputs
    return compare(check, results)


def compiled(check: Check, context: Context) -> Row:
    """One graph without a break."""
    function = torch.compile(check.ours, fullgraph=True, dynamic=False, **context.compiler)
    return compare(check, with_gradients(function, check.inputs))


def repeated(check: Check, context: Context) -> Row:
    """Twice the same bits, where torch's algorithms are to be deterministic."""
    runs = []
    for _ in range(2):
        poison(context.device)
        runs.append([t.detach().clone() for t in with_gradients(check.ours, check.inputs)])
    pairs = enumerate(zip(*runs, strict=True))
    places = [place for place, (first, second) in pairs if not torch.equal(first, second)]
    if places:
        return {"ok": False, "error": f"results {places} of two runs are not the same bits"}
    return compare(check, runs[0])


_WAYS = {"captured": captured, "compiled": compiled, "deterministic": repeated}


def build(operation: str, variant: str, context: Context) -> Check:
    from benchmarks.gpu.jobs import CHECKS, variant_of

    module = importlib.import_module(f"benchmarks.gpu.checks.{CHECKS[operation][0]}")
    torch.manual_seed(0)
    return module.BUILDERS[operation](variant_of(operation, variant), context)


def row_of(operation: str, variant: str, context: Context) -> Row:
    """Runs one check."""
    started = time.perf_counter()
    row: Row = {"kind": "check", "operation": operation, "variant": variant, "path": "torch"}
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        if variant == "deterministic":  # before the choice of a library
            torch.use_deterministic_algorithms(True)
        built = build(operation, variant, context)
        why_not = {"captured": built.not_captured, "compiled": built.not_compiled}.get(variant)
        if why_not:
            raise LeftOut(why_not)
        with counted() as kernels:
            row |= _WAYS.get(variant, correct)(built, context)
        row["path"] = built.path or ("triton" if kernels else "torch")
        row["kernels"] = sorted(kernels)
        if not kernels and not built.path:
            row |= {"ok": False, "error": "no kernel of ours was launched"}
    except LeftOut as reason:
        row |= {"ok": None, "note": str(reason)}
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    return row | {"seconds": round(time.perf_counter() - started, 3)}


def check(operation: str, variant: str, context: Context) -> None:
    """Emits the row of one check."""
    emit(row_of(operation, variant, context))


def precompile(operation: str, variant: str, context: Context) -> None:
    """Compiles what a check will launch. What that computes is garbage, and nobody looks at it."""
    share = shard_asked_for()
    built = build(operation, variant.removesuffix(f" {share}"), context)
    with compiled_only(share):
        with_gradients(built.ours, built.inputs)
