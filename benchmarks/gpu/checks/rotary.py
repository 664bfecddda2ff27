"""Rotary embedding: packed, packed in place, and of queries and keys that lie apart."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.harness import Builder, Check, check, precompile
from nanotron_fast.kernels.rope import (
    rope_qkv,
    rope_qkv_,
    rope_qkv_backward_,
    rope_qkv_reference,
    rope_tables,
)

__all__ = ["BUILDERS", "check", "precompile"]


def _sizes(context: Context) -> tuple[int, int, int, int]:
    """Tokens, query heads, key heads, head_dim."""
    return (8192, 32, 8, 128) if not context.dry else (9, 4, 2, 16)


def _tables(variant: str, context: Context) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos, sin, and positions where the variant has them; half a head turns where it is partial."""
    tokens, _, _, head_dim = _sizes(context)
    rotary_dim = head_dim // 2 if "partial" in variant else head_dim
    cos, sin = rope_tables(rotary_dim, 2 * tokens, device=context.device)
    positions = None
    if "positions" in variant:
        positions = torch.randint(0, 2 * tokens, (tokens,), device=context.device)
    return cos, sin, positions


class _InPlace(torch.autograd.Function):
    """The pair that works over its input, as a block uses it."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, sizes):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        ctx.sizes = sizes
        return rope_qkv_(qkv.detach().clone(), cos, sin, *sizes)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return rope_qkv_backward_(grad.clone(), *ctx.saved_tensors, *ctx.sizes), None, None, None


def _rope_qkv(variant: str, context: Context) -> Check:
    tokens, *sizes = _sizes(context)
    q_heads, kv_heads, head_dim = sizes
    cos, sin, positions = _tables(variant, context)
    width = (q_heads + 2 * kv_heads) * head_dim
    qkv = torch.randn(tokens, width, device=context.device).to(context.dtype()).requires_grad_()
    rest = (positions, variant == "interleaved")

    def reference(qkv: Tensor) -> list[Tensor]:
        parts = rope_qkv_reference(qkv, cos.double(), sin.double(), *sizes, *rest)
        return [torch.cat(parts, 1).flatten(1)] if variant == "in place" else list(parts)

    def ours(qkv: Tensor) -> Tensor | tuple[Tensor, ...]:
        if variant == "in place":
            return _InPlace.apply(qkv, cos, sin, sizes)
        return rope_qkv(qkv, cos, sin, *sizes, *rest)

    return Check([qkv], ours, reference)


def _rope_apart(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.rope.apart import rope_apart, rope_apart_reference

    tokens, q_heads, kv_heads, head_dim = _sizes(context)
    cos, sin, positions = _tables(variant, context)
    members = 2 if "values" in variant else 1
    shapes = ((tokens, q_heads, head_dim), (tokens, members, kv_heads, head_dim))
    inputs = [
        torch.randn(shape, device=context.device).to(context.dtype()).requires_grad_()
        for shape in shapes
    ]
    rest = (positions, "interleaved" in variant)
    return Check(
        inputs,
        lambda q, kv: rope_apart(q, kv, cos, sin, *rest),
        lambda q, kv: rope_apart_reference(q, kv, cos.double(), sin.double(), *rest),
    )


def _rope_normed(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.rope.normed import rope_normed, rope_normed_reference

    tokens, q_heads, kv_heads, head_dim = _sizes(context)
    cos, sin, positions = _tables(variant, context)
    shapes = ((tokens, q_heads, head_dim), (tokens, kv_heads, head_dim), (head_dim,), (head_dim,))
    inputs = [
        torch.randn(shape, device=context.device).to(context.dtype()).requires_grad_()
        for shape in shapes
    ]
    options = {"eps": 1e-6, "position_ids": positions, "interleaved": "interleaved" in variant}
    return Check(
        inputs,
        lambda *given: rope_normed(*given, cos, sin, **options),
        lambda *given: rope_normed_reference(*given, cos.double(), sin.double(), **options),
    )


BUILDERS: dict[str, Builder] = {
    "rope_qkv": _rope_qkv,
    "rope_apart": _rope_apart,
    "rope_normed": _rope_normed,
}
