"""Attention by every backend that is there."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.harness import Builder, Check, LeftOut, check, precompile

__all__ = ["BUILDERS", "check", "precompile"]


def _attention(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.attention import attention, attention_reference, explain

    backend, case = variant.split(" ")
    tokens, heads, head_dim = (33, 2, 16) if context.dry else (4096, 8, 128)
    kv_heads = heads // 2 if case == "gqa" else heads
    device, dtype = context.device, context.dtype(multiplies=True)
    options: dict[str, Any] = {}
    if case == "documents":
        ends = [0, tokens // 4, tokens // 4, tokens // 2 + 3, tokens]
        options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    if case == "window":
        options["window"] = tokens // 8
    lead = (tokens,) if case == "documents" else (1, tokens)
    try:
        name, _ = explain(
            device,
            dtype=dtype,
            head_dim=head_dim,
            has_documents=case == "documents",
            has_window=case == "window",
            backend=backend,
        )
    except ValueError as error:
        if backend == "triton" or context.dry:
            raise
        raise LeftOut(str(error)) from error
    longest = {"max_seqlen": tokens // 2} if case == "documents" else {}
    return Check(
        [
            torch.randn(*lead, n, head_dim, device=device).to(dtype).requires_grad_()
            for n in (heads, kv_heads, kv_heads)
        ],
        lambda q, k, v: attention(q, k, v, **options, **longest, backend=backend),
        lambda q, k, v: attention_reference(q, k, v, **options),
        # Probabilities are rounded before they are multiplied.
        tolerances={torch.bfloat16: 1e-2},
        wide=torch.float32 if not context.dry else torch.float64,
        path="" if name == "triton" else name,
    )


BUILDERS: dict[str, Builder] = {"attention": _attention}
