"""Attention, the linears, the fused products and the blocks: bound by their matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Setting
from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.glu import glu_forward, glu_reference
from nanotron_fast.kernels.matmul import matmul_glu, matmul_rope
from nanotron_fast.kernels.rope import rope_qkv_, rope_qkv_reference, rope_tables
from nanotron_fast.parallel import (
    column_linear,
    row_linear,
    tensor_parallel_attention,
    tensor_parallel_mlp,
)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's own choice: (batch, seq, heads, d)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def attention_cases(setting: Setting) -> Iterator[Case]:
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
        if setting.size != "real":  # no kernel runs on a CPU, or "auto" is it already
            del variants["ours, Triton"]
        yield Case(
            "attention",
            f"causal, {batch}x{seq}, {q_heads}/{kv_heads} heads of {head_dim}",
            tensors,
            variants,
            flops_forward=flops,
            flops_backward=5 * flops // 2,
        )


def _linear_cases(setting: Setting, operation: str) -> Iterator[Case]:
    function = {"column_linear": column_linear, "row_linear": row_linear}[operation]
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


def _without_gradient(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


def mlp_block_cases(setting: Setting) -> Iterator[Case]:
    shapes = setting.pick([(8192, 4096, 14336)], [(6, 32, 48)], [(256, 256, 512)])
    for tokens, hidden, inter in shapes:

        def tensors(tokens: int = tokens, hidden: int = hidden, inter: int = inter) -> list[Tensor]:
            dtype = setting.product_dtype
            return [
                setting.randn(tokens, hidden, dtype=dtype),
                setting.randn(2 * inter, hidden, scale=hidden**-0.5, dtype=dtype),
                setting.randn(hidden, inter, scale=inter**-0.5, dtype=dtype),
            ]

        first = 4 * tokens * hidden * inter
        yield Case(
            "mlp_block",
            f"matmul_glu {tokens}x{hidden}x{2 * inter}",
            lambda make=tensors: _without_gradient(make()[:2]),
            {
                "torch": lambda x, w: glu_reference(F.linear(x, w)),
                "ours, the vendor's product": lambda x, w: glu_forward(F.linear(x, w)),
                "ours, fused": matmul_glu,
            },
            flops_forward=first,
        )

        def plain(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            gate, up = F.linear(x, gate_up).chunk(2, -1)
            return F.linear(F.silu(gate) * up, down)

        yield Case(
            "mlp_block",
            f"{tokens}x{hidden}, inter {inter}",
            tensors,
            {
                "torch": plain,
                "torch.compile": setting.compile(plain),
                "ours": partial(tensor_parallel_mlp, recompute=False),
                "ours, recomputing": tensor_parallel_mlp,
            },
            flops_forward=first + first // 2,
            flops_backward=3 * first,
        )


def attention_block_cases(setting: Setting) -> Iterator[Case]:
    real = [(8192, 4096, 32, 8, 128)]
    shapes = setting.pick(real, [(12, 32, 2, 1, 16)], [(128, 256, 8, 2, 32)])
    for tokens, hidden, q_heads, kv_heads, head_dim in shapes:
        heads = (q_heads, kv_heads, head_dim)
        packed, inner = (q_heads + 2 * kv_heads) * head_dim, q_heads * head_dim
        tables = rope_tables(head_dim, tokens, device=setting.device)
        sizes = ((tokens, hidden), (packed, hidden), (hidden, inner))

        def tensors(sizes: tuple[tuple[int, int], ...] = sizes) -> list[Tensor]:
            scales = (1.0, *(size[1] ** -0.5 for size in sizes[1:]))
            pairs = zip(sizes, scales, strict=True)
            return [setting.randn(*s, scale=f, dtype=setting.product_dtype) for s, f in pairs]

        def rotated(x: Tensor, w: Tensor, tables=tables, heads=heads) -> Tensor:
            parts = rope_qkv_reference(F.linear(x, w), *tables, *heads)
            return torch.cat(parts, 1).flatten(1)

        product = 2 * tokens * hidden * packed
        yield Case(
            "attention_block",
            f"matmul_rope {tokens}x{hidden}x{packed}",
            lambda make=tensors: _without_gradient(make()[:2]),
            {
                "torch": rotated,
                "ours, the vendor's product": lambda x, w, t=tables, h=heads: rope_qkv_(
                    F.linear(x, w), *t, *h
                ),
                "ours, fused": lambda x, w, t=tables, h=heads: matmul_rope(x, w, None, *t, *h),
            },
            flops_forward=product,
        )

        def plain(x: Tensor, w: Tensor, o: Tensor, tables=tables, heads=heads) -> Tensor:
            q, k, v = rope_qkv_reference(F.linear(x, w), *tables, *heads)
            return F.linear(sdpa(q[None], k[None], v[None]).flatten(2)[0], o)

        named = dict(zip(("num_q_heads", "num_kv_heads", "head_dim"), heads, strict=True))

        def ours(x: Tensor, w: Tensor, o: Tensor, tables=tables, named=named) -> Tensor:
            return tensor_parallel_attention(x, w, o, *tables, **named, recompute=False)

        scores = 2 * tokens * tokens * inner
        linears = product + 2 * tokens * inner * hidden
        yield Case(
            "attention_block",
            f"{tokens}x{hidden}, {q_heads}/{kv_heads} heads of {head_dim}",
            tensors,
            {"torch": plain, "torch.compile": setting.compile(plain), "ours": ours},
            flops_forward=linears + scores,
            flops_backward=2 * linears + 5 * scores // 2,
        )
