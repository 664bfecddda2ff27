"""Times a training step of the installed Nanotron: the drop-in off, each operation of it, all on.

    python benchmarks/bench_step.py [--cpu] [--save]

One process, one GPU, a Llama with a few layers of Llama 3 8B's shape, in bf16 with fp32
accumulation, clipping and AdamW, as Nanotron's trainer steps. In each round every variant builds
its model anew, warms up and is timed; rounds are interleaved, and all samples count. Where
flash-attn is not installed, Nanotron's own attention is our stand-in for it: `flash_attn` in the
result says so. With --cpu it is a small model over gloo, to see that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from bench_convert import RESULTS, environment

import nanotron_fast as nf
from nanotron_fast.patch.cpu import cpu_mode
from nanotron_fast.patch.importing import import_nanotron
from nanotron_fast.patch.nanotron.targets import FUSED, OPS, installed_version
from nanotron_fast.patch.stand_ins import is_stand_in

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 4,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
CHECKPOINTS = {"save_weights", "load_weights"}
VARIANTS = {
    "off": (),
    **{op: (op,) for op in OPS if op not in CHECKPOINTS and op != "residual"},
    "rms_norm, residual": ("rms_norm", "residual"),
    "all": tuple(op for op in OPS if op not in CHECKPOINTS),
    "all, fused": tuple(op for op in (*OPS, *FUSED) if op not in CHECKPOINTS),
}


def start() -> Any:
    """Nanotron's parallel context of this process alone."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1")
    from nanotron.parallel import ParallelContext

    sizes = {f"{each}_parallel_size": 1 for each in ("tensor", "pipeline", "data")}
    return ParallelContext(**sizes)


def build(context: Any, sizes: dict[str, int]) -> tuple[Any, Any, Any]:
    """A model with random weights, Nanotron's optimizer around AdamW, and its accumulator."""
    from nanotron.config import LlamaConfig, ParallelismArgs
    from nanotron.models import build_model
    from nanotron.models.llama import LlamaForTraining
    from nanotron.optim.gradient_accumulator import FP32GradientAccumulator
    from nanotron.optim.named_optimizer import NamedOptimizer
    from nanotron.optim.optimizer_from_gradient_accumulator import OptimizerFromGradientAccumulator
    from nanotron.parallel.tensor_parallel.nn import TensorParallelLinearMode
    from nanotron.trainer import mark_tied_parameters

    parallel = ParallelismArgs(
        dp=1,
        pp=1,
        tp=1,
        tp_mode=TensorParallelLinearMode.ALL_REDUCE,  # main raises at tp=1 in the other one
        tp_linear_async_communication=False,
    )
    model = build_model(
        model_builder=lambda: LlamaForTraining(
            config=LlamaConfig(**sizes), parallel_context=context, parallel_config=parallel
        ),
        parallel_context=context,
        dtype=torch.bfloat16,
    )
    mark_tied_parameters(model, context, parallel)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.02)
    parameters = list(model.get_named_params_with_correct_tied())
    optimizer = OptimizerFromGradientAccumulator(
        gradient_accumulator_builder=lambda named: FP32GradientAccumulator(
            named_parameters=named, grad_buckets_named_params=parameters
        ),
        named_params_or_groups=parameters,
        optimizer_builder=lambda groups: NamedOptimizer(
            named_params_or_groups=groups,
            optimizer_builder=lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        ),
    )
    return model, optimizer, optimizer.gradient_accumulator


def make_step(
    context: Any, sizes: dict[str, int], batch: int, sequence: int
) -> Callable[[], torch.Tensor]:
    """One step of a new model: forward, backward, clipping, AdamW."""
    from nanotron import trainer  # its clip_grad_norm is the one that a run calls

    model, optimizer, accumulator = build(context, sizes)
    parameters = [(name, each) for name, each in model.get_named_params_with_correct_tied()]
    tokens = torch.randint(0, sizes["vocab_size"], (batch, sequence + 1), device="cuda")
    ones = torch.ones(batch, sequence, dtype=torch.bool, device="cuda")
    inputs = {
        "input_ids": tokens[:, :-1].contiguous(),
        "input_mask": ones,
        "label_ids": tokens[:, 1:].contiguous(),
        "label_mask": ones,
    }

    def step() -> torch.Tensor:
        loss: torch.Tensor = model(**inputs)["loss"]
        accumulator.backward(loss)
        trainer.clip_grad_norm(
            mp_pg=context.mp_pg if hasattr(context, "mp_pg") else context.world_pg,
            named_parameters=parameters,
            max_norm=1.0,
            grad_accumulator=accumulator,
        )
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def time_steps(step: Callable[[], Any], warmup: int, steps: int) -> list[float]:
    """Milliseconds of each step."""
    samples = []
    for index in range(warmup + steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if index >= warmup:
            samples.append(1e3 * (time.perf_counter() - started))
    return samples


def measure(context: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    sizes, batch, sequence = (TINY, 2, 64) if options.cpu else (SHAPE, 2, 4096)
    samples: dict[str, list[float]] = {name: [] for name in VARIANTS}
    peaks: dict[str, int] = dict.fromkeys(VARIANTS, 0)
    losses: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, ops in VARIANTS.items():
            torch.manual_seed(0)
            if ops:
                nf.enable(ops)
            step = make_step(context, sizes, batch, sequence)
            losses[name] = step().item()
            torch.cuda.reset_peak_memory_stats()
            samples[name] += time_steps(step, options.warmup, options.steps)
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
            del step
            nf.disable()
            gc.collect()
            torch.cuda.empty_cache()
    rows = []
    for name in VARIANTS:
        if abs(losses[name] - losses["off"]) > 0.02 * losses["off"]:
            raise SystemExit(f"{name}: loss {losses[name]}, Nanotron has {losses['off']}")
        p20, p50, p80 = (statistics.quantiles(samples[name], n=10)[i] for i in (1, 4, 7))
        rows.append(
            {
                "name": name,
                "p20_ms": round(p20, 2),
                "p50_ms": round(p50, 2),
                "p80_ms": round(p80, 2),
                "tokens_per_s": batch * sequence / p50 * 1e3,
                "peak_gb": None if options.cpu else round(peaks[name] / 1e9, 2),
                "first_loss": losses[name],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="a small model over gloo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/step.json")
    options = parser.parse_args()
    if options.cpu and options.save:
        parser.error("a small model on a CPU is no result to keep: --save wants a GPU")
    with cpu_mode() if options.cpu else nullcontext():
        import_nanotron()
        variants = measure(start(), options)
    gpu = "none" if options.cpu else torch.cuda.get_device_name()
    about = environment() | {
        "gpu": gpu,
        "torch": torch.__version__,
        "nanotron": installed_version(),
        "flash_attn": "stand-in" if is_stand_in("flash_attn") else "installed",
    }
    sizes = TINY if options.cpu else SHAPE
    model = f"Llama, {sizes['num_hidden_layers']} layers, hidden {sizes['hidden_size']}, bf16, tp=1"
    for row in variants:
        ratio = row["p50_ms"] / variants[0]["p50_ms"]
        memory = "" if row["peak_gb"] is None else f"{row['peak_gb']:8.2f} GB"
        print(f"{row['name']:20}{row['p50_ms']:10.2f} ms {ratio:6.2f}x{memory}")
    if options.save:
        document = {"environment": about, "model": model, "variants": variants}
        (RESULTS / "step.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
