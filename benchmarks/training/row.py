"""One setting of one variant on a GPU, in a process of its own: `row` measures it."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.rows import Row
from benchmarks.gpu.timing import quantiles
from benchmarks.training.shapes import SETTINGS, Shape, tiny
from benchmarks.training.sides import (
    fill,
    our_decoder,
    our_step,
    transformers_model,
    transformers_step,
)
from benchmarks.training.variants import lacking

_WARMUP, _STEPS = 3, 10
# Takes a number, gives the loss and, where the side says it, the norm of the gradient.
Step = Callable[[int], tuple[Tensor, Tensor | None]]


def _ours(shape: Shape, context: Context) -> Step:
    device = context.device
    model = transformers_model(shape, device)
    decoder = our_decoder(shape, device, context.dtype(multiplies=True))
    fill(decoder, model)
    del model
    return our_step(shape, decoder, device)


def _transformers(shape: Shape, context: Context, how: str) -> Step:
    if how == "Liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = transformers_model(shape, context.device)
    if how == "torch.compile":
        model.compile(**context.compiler)
    return transformers_step(shape, model, context.device, context.dtype(multiplies=True))


def _nanotron(shape: Shape, context: Context, stack: ExitStack, *, is_on: bool) -> Step:
    """The installed Nanotron, as `bench_step.py` steps it, with weights of its own."""
    sys.path.append(str(Path(__file__).parents[1]))
    import bench_step

    import nanotron_fast as nf
    from nanotron_fast.patch.cpu import cpu_mode
    from nanotron_fast.patch.importing import import_nanotron

    if context.dry:
        stack.enter_context(cpu_mode())
    import_nanotron()
    if is_on:
        nf.enable(bench_step.VARIANTS["all"])
    names = bench_step.SHAPE.keys() & shape.config.keys()
    sizes = {name: shape.config[name] for name in names}
    take = bench_step.make_step(bench_step.start(), sizes, shape.rows, shape.length)
    return lambda number: (take(), None)


def _step(variant: str, shape: Shape, context: Context, stack: ExitStack) -> Step:
    who, _, how = variant.partition(", ")
    if who == "ours":
        return _ours(shape, context)
    if who == "transformers":
        return _transformers(shape, context, how)
    return _nanotron(shape, context, stack, is_on=bool(how))


def _peak_bytes(context: Context) -> int:
    if context.dry:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def _measured(shape: Shape, step: Step, context: Context) -> Row:
    """The first step's loss and norm; then times, and the peak of memory over them."""
    loss, norm = step(0)
    row: Row = {"first_loss": loss.item(), "first_norm": None if norm is None else norm.item()}
    gc.collect()
    if not context.dry:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    samples = []
    warmup, steps = (0, 1) if context.dry else (_WARMUP, _STEPS)
    for number in range(warmup + steps):
        context.synchronize()
        begun = time.perf_counter()
        step(1 + number)
        context.synchronize()
        if number >= warmup:
            samples.append(1e3 * (time.perf_counter() - begun))
    times = quantiles(samples, "wall")
    seconds = times.p50_ms / 1e3
    rates = {
        "tokens_per_s": round(shape.tokens / seconds, 1),
        "tflop_per_s": round(shape.flops / seconds / 1e12, 6 if context.dry else 1),
        "mfu": _mfu(shape, seconds, context),
        "peak_memory_gb": round(_peak_bytes(context) / 1e9, 2),
    }
    return row | times.row() | rates


def _mfu(shape: Shape, seconds: float, context: Context) -> float | None:
    """The share of the vendor's peak; None for a device of which nothing is known."""
    from nanotron_fast.train.devices import peak_flops

    name = "a CPU" if context.dry else torch.cuda.get_device_name()
    peak = peak_flops(name, "bfloat16")
    return None if peak is None else round(shape.flops / seconds / peak, 4)


def row(setting: str, variant: str, *, dry: bool) -> Row:
    """What is known of it. `ok` is None with a note where it cannot run here."""
    context = Context(dry=dry)
    shape = tiny(SETTINGS[setting]) if dry else SETTINGS[setting]
    about: Row = {"kind": "step", "operation": setting, "variant": variant}
    about |= {"parameters_m": round(shape.parameters / 1e6, 3), "tokens": shape.tokens}
    note = lacking(variant)
    if note:
        return about | {"ok": None, "note": note}
    with ExitStack() as stack:
        try:
            found = _measured(shape, _step(variant, shape, context, stack), context)
        except torch.OutOfMemoryError:
            return about | {"ok": None, "note": _out_of_memory(context)}
        return about | {"ok": True} | found


def _out_of_memory(context: Context) -> str:
    if context.dry:
        return "out of memory"
    total: Any = torch.cuda.get_device_properties(0).total_memory
    return f"out of memory: it needs more than the {total / 1e9:.0f} GB of this GPU"
