"""The fused blocks, and the products that are fused with what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Setting
from benchmarks.gpu.cases.products import sdpa


def _without_gradient(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


def mlp_block_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.glu import glu_forward, glu_reference
    from nanotron_fast.kernels.matmul import matmul_glu
    from nanotron_fast.parallel import tensor_parallel_mlp

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


def attention_block_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.matmul import matmul_rope
    from nanotron_fast.kernels.rope import rope_qkv_, rope_qkv_reference, rope_tables
    from nanotron_fast.parallel import tensor_parallel_attention

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

        def plain(x: Tensor, w: Tensor, o: Tensor, tables=tables, heads=heads) -> Tensor:
            q, k, v = rope_qkv_reference(F.linear(x, w), *tables, *heads)
            return F.linear(sdpa(q[None], k[None], v[None]).flatten(2)[0], o)

        named = dict(zip(("num_q_heads", "num_kv_heads", "head_dim"), heads, strict=True))

        def ours(x: Tensor, w: Tensor, o: Tensor, tables=tables, named=named) -> Tensor:
            return tensor_parallel_attention(x, w, o, *tables, **named, recompute=False)

        product = 2 * tokens * hidden * packed
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

        def rotated(x: Tensor, w: Tensor, tables=tables, heads=heads) -> Tensor:
            parts = rope_qkv_reference(F.linear(x, w), *tables, *heads)
            return torch.cat(parts, 1).flatten(1)

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
