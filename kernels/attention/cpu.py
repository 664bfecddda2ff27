"""Attention of CPU tensors, by torch's own flash kernels for the CPU: everything but a softcap.

Documents of one length that follow each other are a batch of their own, so no scores between two
documents are computed; what the kernels have no word for (a window, fewer or more queries than
keys under a causal mask) is a mask. Under torch.compile, which must not look at the numbers in
cu_seqlens, documents are a mask too.

Shapes are those of `attention`; lse (batch, H, seq_q), or (H, tokens) with cu_seqlens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotron_fast.kernels.attention.reference import visible_keys

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Run(NamedTuple):
    """Rows of a packed tensor, and how many documents of one length they are."""

    rows: slice
    documents: int


def _runs(cu_seqlens: Tensor) -> Iterator[Run]:
    """The documents in order, without the empty ones."""
    start = 0
    for length, documents in itertools.groupby(cu_seqlens.diff().tolist()):
        count = sum(1 for _ in documents)
        if length:
            yield Run(slice(start, start + count * length), count)
        start += count * length


def _batched(run: Run, *tensors: Tensor) -> list[Tensor]:
    """(tokens, heads, d) -> (documents, length, heads, d)."""
    return [tensor[run.rows].unflatten(0, (run.documents, -1)) for tensor in tensors]


def _mask(
    q: Tensor, k: Tensor, causal: bool, cu_seqlens: Tensor | None, window: int | None
) -> Tensor | None:
    """(seq_q, seq_k) bool: what the kernels' own causal mask does not say; None where it does."""
    seq_q, seq_k = q.shape[1], k.shape[1]
    if cu_seqlens is None and window is None and not (causal and seq_q != seq_k):
        return None
    return visible_keys(seq_q, seq_k, causal, cu_seqlens, window, q.device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """out, for autograd. A query that sees no key has 0."""
    plain = {"causal": causal, "window": window, "scale": scale}
    if cu_seqlens is None:
        return _attend(q, k, v, cu_seqlens=None, **plain)
    runs = [] if torch.compiler.is_compiling() else [*_runs(cu_seqlens)]
    if not runs:
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        return _attend(q, k, v, cu_seqlens=cu_seqlens, **plain).squeeze(0)
    outs = [
        _attend(*_batched(run, q, k, v), cu_seqlens=None, **plain).flatten(0, 1) for run in runs
    ]
    num_rows = sum(len(out) for out in outs)
    return torch.cat([*outs, torch.zeros_like(q[num_rows:])])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    mask = _mask(q, k, causal, cu_seqlens, window)
    out = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out.transpose(1, 2).to(q.dtype)  # autocast has another dtype


def _scores_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as the kernels take it, who add it to the scores: 0 or -inf."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and lse, which is -inf where a query sees no key."""
    if cu_seqlens is not None:
        out, lse = torch.zeros_like(q), q.new_full(q.shape[1::-1], float("-inf"), dtype=_wide(q))
        for run in _runs(cu_seqlens):
            part, part_lse = forward(
                *_batched(run, q, k, v), cu_seqlens=None, causal=causal, window=window, scale=scale
            )
            out[run.rows] = part.flatten(0, 1)
            lse[:, run.rows] = part_lse.transpose(0, 1).flatten(1)
        return out, lse
    mask = _mask(q, k, causal, None, window)
    out, lse = _FORWARD(
        *_by_head(q, k, v),
        0.0,
        causal and mask is None,
        attn_mask=_scores_mask(mask, q.dtype),
        scale=scale,
    )
    if mask is not None:
        lse = lse.masked_fill(~mask.any(-1), float("-inf"))
    return out.transpose(1, 2), lse


def _by_head(*tensors: Tensor) -> Iterator[Tensor]:
    """(batch, heads, seq, d), contiguous: a head's rows beside each other, which the kernels walk.

    The copies take a hundredth of the time that views of the packed QKV would cost there.
    """
    return (tensor.transpose(1, 2).contiguous() for tensor in tensors)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    if cu_seqlens is not None:
        gradients = tuple(torch.zeros_like(t) for t in (q, k, v))
        for run in _runs(cu_seqlens):
            part_lse = lse[:, run.rows].unflatten(1, (run.documents, -1)).transpose(0, 1)
            parts = backward(
                *_batched(run, dout, q, k, v, out),
                part_lse,
                cu_seqlens=None,
                causal=causal,
                window=window,
                scale=scale,
            )
            for gradient, part in zip(gradients, parts, strict=True):
                gradient[run.rows] = part.flatten(0, 1)
        dq, dk, dv = gradients
        return dq, dk, dv
    mask = _mask(q, k, causal, None, window)
    dout, q, k, v, out = _by_head(dout, q, k, v, out)
    # A row that sees nothing has scores and a lse of -inf, whose difference would be NaN. With 0 as
    # its lse, its weights are 0.
    lse = lse.masked_fill(lse == float("-inf"), 0.0).contiguous()
    found = _BACKWARD(
        dout,
        q,
        k,
        v,
        out,
        lse,
        0.0,
        causal and mask is None,
        attn_mask=_scores_mask(mask, q.dtype),
        scale=scale,
    )
    dq, dk, dv = (t.transpose(1, 2) for t in found)
    return dq, dk, dv
