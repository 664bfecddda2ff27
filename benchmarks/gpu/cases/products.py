"""Attention and the linears: bound by their matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Setting


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's own choice: (batch, seq, heads, d)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def _add_backends(case: Case, setting: Setting, head_dim: int) -> Case:
    """Each library by its name, or why it is none here: "auto" is to be the fastest of them."""
    from nanotron_fast.kernels.attention import attention, explain
    from nanotron_fast.kernels.attention.choice import PREFERENCE

    facts = {"dtype": setting.product_dtype, "head_dim": head_dim}
    case.paths["ours, auto"] = explain(setting.device, **facts)[0]
    for name in PREFERENCE[: PREFERENCE.index("triton")]:
        try:
            explain(setting.device, **facts, backend=name)
        except ValueError as error:
            case.absent[name] = str(error)
            continue
        case.variants[name] = partial(attention, backend=name)
        case.paths[name] = name
    return case


def attention_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.attention import attention

    real = [(1, 8192, 32, 8, 128), (1, 16384, 32, 8, 128), (4, 4096, 32, 32, 64)]
    shapes = setting.pick(real, [(1, 20, 2, 1, 16)], [(1, 256, 8, 2, 64)])
    for batch, seq, q_heads, kv_heads, head_dim in shapes:
        heads = (q_heads, kv_heads, kv_heads)

        def tensors(b: int = batch, s: int = seq, heads=heads, d: int = head_dim) -> list[Tensor]:
            return [setting.randn(b, s, n, d, dtype=setting.product_dtype) for n in heads]

        flops = 2 * batch * seq * seq * q_heads * head_dim  # two products, half of each masked
        variants = {
            "torch SDPA": sdpa,
            "ours, auto": attention,
            "ours, Triton": partial(attention, backend="triton"),
        }
        if setting.size in ("tiny", "cpu"):  # no kernel runs on a CPU, or "auto" is it already
            del variants["ours, Triton"]
        case = Case(
            "attention",
            f"causal, {batch}x{seq}, {q_heads}/{kv_heads} heads of {head_dim}",
            tensors,
            variants,
            flops_forward=flops,
            flops_backward=5 * flops // 2,
        )
        yield _add_backends(case, setting, head_dim)


def _linear_cases(setting: Setting, operation: str) -> Iterator[Case]:
    from nanotron_fast.parallel import linear

    function = getattr(linear, operation)
    real = [(8192, 4096, 28672)] if operation == "column_linear" else [(8192, 14336, 4096)]
    for tokens, hidden, out in setting.pick(real, [(6, 24, 40)], [(256, 256, 512)]):
        main = torch.zeros(out, hidden, device=setting.device)

        def tensors(tokens: int = tokens, hidden: int = hidden, out: int = out) -> list[Tensor]:
            dtype = setting.product_dtype
            weight = setting.randn(out, hidden, scale=hidden**-0.5, dtype=dtype)
            return [setting.randn(tokens, hidden, dtype=dtype), weight]

        def with_main_grad(x: Tensor, weight: Tensor, main: Tensor = main) -> Tensor:
            weight.main_grad = main
            return function(x, weight)

        flops = 2 * tokens * hidden * out
        yield Case(
            operation,
            f"{tokens}x{hidden}x{out}",
            tensors,
            {
                "torch": F.linear,
                "ours": function,
                "ours, main_grad": with_main_grad,
            },
            flops_forward=flops,
            flops_backward=2 * flops,
            unlike=("ours, main_grad",),
        )


def column_linear_cases(setting: Setting) -> Iterator[Case]:
    yield from _linear_cases(setting, "column_linear")


def row_linear_cases(setting: Setting) -> Iterator[Case]:
    yield from _linear_cases(setting, "row_linear")
