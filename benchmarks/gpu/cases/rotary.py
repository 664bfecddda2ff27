"""Rotary embedding, of packed projections and of those that lie apart."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from benchmarks.gpu.cases.case import Case, Setting
from nanotron_fast.kernels.rope import rope_qkv, rope_qkv_reference, rope_tables


def _rope_shapes(setting: Setting) -> list[tuple[int, int, int, int]]:
    real = [(8192, 32, 8, 128), (8192, 32, 32, 128)]
    swept = [(8192, 32, 8, 128), (8192, 32, 4, 64)]
    return setting.pick(real, [(6, 4, 2, 16)], [(512, 8, 2, 64)], swept)


def rope_qkv_cases(setting: Setting) -> Iterator[Case]:
    for tokens, q_heads, kv_heads, head_dim in _rope_shapes(setting):
        cos, sin = rope_tables(head_dim, tokens, device=setting.device)
        options = (cos, sin, q_heads, kv_heads, head_dim)
        width = (q_heads + 2 * kv_heads) * head_dim

        def tensors(tokens: int = tokens, width: int = width) -> list[Tensor]:
            return [setting.randn(tokens, width)]

        yield Case(
            "rope_qkv",
            f"{tokens} tokens, {q_heads}+2x{kv_heads} heads of {head_dim}",
            tensors,
            {
                "torch": lambda x, o=options: rope_qkv_reference(x, *o),
                "torch.compile": setting.compile(lambda x, o=options: rope_qkv_reference(x, *o)),
                "ours": lambda x, o=options: rope_qkv(x, *o),
            },
            bytes_forward=2 * tokens * width * setting.dtype.itemsize,
            bytes_backward=2 * tokens * width * setting.dtype.itemsize,
        )


def rope_apart_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.rope.apart import rope_apart, rope_apart_reference

    for tokens, q_heads, kv_heads, head_dim in _rope_shapes(setting):
        tables = rope_tables(head_dim, tokens, device=setting.device)
        shapes = ((tokens, q_heads, head_dim), (tokens, 2, kv_heads, head_dim))

        def tensors(shapes: tuple[tuple[int, ...], ...] = shapes) -> list[Tensor]:
            return [setting.randn(*shape) for shape in shapes]

        num_bytes = 2 * tokens * (q_heads + 2 * kv_heads) * head_dim * setting.dtype.itemsize
        yield Case(
            "rope_apart",
            f"{tokens} tokens, {q_heads} and 2x{kv_heads} heads of {head_dim}",
            tensors,
            {
                "torch": lambda q, kv, t=tables: rope_apart_reference(q, kv, *t),
                "torch.compile": setting.compile(
                    lambda q, kv, t=tables: rope_apart_reference(q, kv, *t)
                ),
                "ours": lambda q, kv, t=tables: rope_apart(q, kv, *t),
            },
            bytes_forward=num_bytes,
            bytes_backward=num_bytes,
        )


def rope_normed_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.rms_norm import rms_norm
    from nanotron_fast.kernels.rope.apart import rope_apart
    from nanotron_fast.kernels.rope.normed import rope_normed, rope_normed_reference

    for tokens, q_heads, kv_heads, head_dim in _rope_shapes(setting):
        tables = rope_tables(head_dim, tokens, device=setting.device)
        shapes = ((tokens, q_heads, head_dim), (tokens, kv_heads, head_dim))

        def tensors(
            shapes: tuple[tuple[int, ...], ...] = shapes, dim: int = head_dim
        ) -> list[Tensor]:
            return [setting.randn(*shape) for shape in (*shapes, (dim,), (dim,))]

        def apart(q, k, q_weight, k_weight, t=tables):
            q, keys = rope_apart(rms_norm(q, q_weight), rms_norm(k, k_weight)[:, None], *t)
            return q, keys[:, 0]

        elements = tokens * (q_heads + kv_heads) * head_dim * setting.dtype.itemsize
        yield Case(
            "rope_normed",
            f"{tokens} tokens, {q_heads} and {kv_heads} heads of {head_dim}",
            tensors,
            {
                "torch": lambda *given, t=tables: rope_normed_reference(*given, *t, 1e-6),
                "torch.compile": setting.compile(
                    lambda *given, t=tables: rope_normed_reference(*given, *t, 1e-6)
                ),
                "ours, in two": apart,
                "ours": lambda *given, t=tables: rope_normed(*given, *t),
            },
            bytes_forward=2 * elements,
            bytes_backward=3 * elements,
        )
