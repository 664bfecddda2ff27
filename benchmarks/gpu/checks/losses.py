"""Cross entropy, by itself and behind the head's product, and the embedding."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.harness import Builder, Check, check, precompile

__all__ = ["BUILDERS", "check", "precompile"]

_IGNORED = -100


def _options(variant: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "z-loss" in variant:
        options["z_loss"] = 0.1  # as large as what it is added to
    if "ignore_index" in variant:
        options["ignore_index"] = _IGNORED
    if variant.startswith("correct"):
        options["z_loss_mode"] = "correct"
    return options


def _target(tokens: int, vocab: int, options: dict[str, Any], context: Context) -> torch.Tensor:
    target = torch.randint(0, vocab, (tokens,), device=context.device)
    if "ignore_index" in options:
        target[::3] = _IGNORED
    return target


def _cross_entropy(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.cross_entropy import (
        vocab_parallel_cross_entropy,
        vocab_parallel_cross_entropy_reference,
    )

    tokens, vocab = context.size(1024, 6), context.size(128256, 300)
    if "small vocabulary" in variant:  # the softmax weighs as much as the targets
        tokens, vocab = context.size(4096, 6), context.size(48, 12)
    options = _options(variant)
    target = _target(tokens, vocab, options, context)
    logits = torch.randn(tokens, vocab, device=context.device).to(context.dtype()).requires_grad_()
    return Check(
        [logits],
        # Not a leaf, as behind the head's product: over a leaf the gradient is not written.
        lambda x: vocab_parallel_cross_entropy(x * 1, target, **options),
        lambda x: vocab_parallel_cross_entropy_reference(x, target, **options),
    )


def _linear_cross_entropy(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.linear_cross_entropy import (
        linear_cross_entropy,
        linear_cross_entropy_reference,
    )

    tokens, hidden, vocab = (6, 24, 300) if context.dry else (2048, 4096, 65536)
    options = _options(variant)
    options["reduction"] = "none" if "none" in variant else "mean"
    chunk_tokens = tokens // 3 if "in chunks" in variant else None
    target = _target(tokens, vocab, options, context)
    device, dtype = context.device, context.dtype()
    x = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, device=device) * hidden**-0.5).to(dtype).requires_grad_()
    return Check(
        [x, weight],
        lambda x, w: linear_cross_entropy(x, w, target, chunk_tokens=chunk_tokens, **options),
        lambda x, w: linear_cross_entropy_reference(x, w, target, **options),
        # Logits are rounded, and their gradients again.
        tolerances={torch.bfloat16: 1e-2, torch.float32: 1e-3},
    )


def _embedding(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.embedding import (
        vocab_parallel_embedding,
        vocab_parallel_embedding_reference,
    )

    tokens, vocab, hidden = (9, 30, 24) if context.dry else (8192, 32000, 4096)
    options = {"padding_idx": 3} if variant == "padding_idx" else {}
    ids = torch.randint(0, vocab, (tokens,), device=context.device)
    ids[::4] = 3
    weight = torch.randn(vocab, hidden, device=context.device).to(context.dtype()).requires_grad_()
    return Check(
        [weight],
        lambda w: vocab_parallel_embedding(ids, w, **options),
        lambda w: vocab_parallel_embedding_reference(ids, w, **options),
    )


BUILDERS: dict[str, Builder] = {
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "embedding": _embedding,
}
