"""A whole training step of a Llama: tokens a second, MFU, CPU time, top kernels, peak memory.

`mfu` is the share of the vendor's peak, `mfu_of_ceiling` that of the product measured here.
"""

from __future__ import annotations

import resource
import time
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.context import Context
from benchmarks.gpu.decoder import SHAPES, Shape, Trainer, narrow, tiny
from benchmarks.gpu.launches import counted
from benchmarks.gpu.rows import Row, emit
from nanotron_fast.train.devices import peak_flops

_TOP = 12
_NAME_CHARACTERS = 90


def _top_kernels(trainer: Trainer, context: Context) -> list[tuple[str, float, int]]:
    """Name, milliseconds in a step, calls. On a CPU operators stand in for kernels."""
    kind = ProfilerActivity.CPU if context.dry else ProfilerActivity.CUDA
    with profile(activities=[kind]) as seen:
        trainer.step()
        context.synchronize()
    found = []
    for event in seen.key_averages():
        took = event.self_cpu_time_total if context.dry else event.self_device_time_total
        found.append((event.key[:_NAME_CHARACTERS], round(took / 1e3, 4), event.count))
    return sorted(found, key=lambda each: -each[1])[:_TOP]


def _cpu_ms(shape: Shape, context: Context, *, is_ours: bool) -> float:
    """What the processor needs to launch a step, by the clock on the wall.

    That of the step itself cannot be read: its launches wait where the queue of the GPU is full.
    So the same step is taken with so little work in each kernel that the GPU keeps up.
    """
    dtype = context.dtype(multiplies=True)
    trainer = Trainer(shape, context.device, dtype, is_ours=is_ours)
    samples = []
    for _ in range(1 if context.dry else 8):
        context.synchronize()
        begun = time.perf_counter()
        trainer.step()
        samples.append(time.perf_counter() - begun)
    context.synchronize()
    return median(samples[0 if context.dry else 3 :]) * 1e3


def _peak_memory_gb(context: Context) -> float:
    if context.dry:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return torch.cuda.max_memory_allocated() / 1e9


def run(operation: str, variant: str, context: Context) -> None:
    """Emits the row of a model (`operation`) on one side (`variant`), its top kernels, CPU time."""
    shape = tiny(SHAPES[operation]) if context.dry else SHAPES[operation]
    about: Row = {"kind": "step", "operation": operation, "variant": variant}
    dtype = context.dtype(multiplies=True)
    trainer = Trainer(shape, context.device, dtype, is_ours=variant == "ours")
    with counted() as kernels:
        losses = [trainer.step().item() for _ in range(1 if context.dry else 4)]
    whole = []
    for _ in range(1 if context.dry else 8):
        context.synchronize()
        begun = time.perf_counter()
        loss = trainer.step()
        context.synchronize()
        whole.append(time.perf_counter() - begun)
        losses.append(loss.item())
    seconds = median(whole)
    rate = shape.flops / seconds / 1e12
    row = about | {
        "path": "triton" if kernels else "torch",
        "tokens": shape.tokens,
        "parameters_m": round(sum(w.numel() for w in trainer.weights) / 1e6, 3),
        "tokens_per_s": round(shape.tokens / seconds, 1),
        "step_ms": round(seconds * 1e3, 3),
        "tflop_per_s": round(rate, 6 if context.dry else 2),
        "peak_memory_gb": round(_peak_memory_gb(context), 3),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }
    peak = None if context.dry else peak_flops(torch.cuda.get_device_name(), "bfloat16")
    if peak:
        row["mfu"] = round(shape.flops / seconds / peak, 4)
    ceiling = context.ceilings.get("matmul_tflop_per_s", 0.0)
    if ceiling:
        row["mfu_of_ceiling"] = round(rate / ceiling, 4)
    # On one batch again and again: a step that learns nothing is wrong somewhere.
    row["ok"] = losses[-1] < losses[0]
    if not row["ok"]:
        row["error"] = f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} on the same batch"
    emit(row)
    emit(about | {"ok": True, "top_kernels": _top_kernels(trainer, context)})
    del trainer
    narrowed = shape if context.dry else narrow(shape)
    cpu_ms = _cpu_ms(narrowed, context, is_ours=variant == "ours")
    emit(about | {"ok": True, "cpu_ms": round(cpu_ms, 3)})
