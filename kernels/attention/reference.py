"""Attention in plain torch: what the kernels are held to, and what runs a softcap off the GPU.

    s = scale * q k^T          s = softcap * tanh(s / softcap) where a softcap is given
    lse = log(sum over visible keys of e^s)      out = e^(s - lse) v

At least in fp32, with all scores in memory at once. A row that sees no key has out = 0 and
lse = -inf. Backward, from out and lse alone:

    p = e^(s - lse)    dv = p^T dout    ds = p * (dout v^T - rowsum(dout * out))
    ds *= 1 - tanh^2 under a softcap    dq = scale * ds k    dk = scale * ds^T q

Shapes: q, out (batch, seq_q, H, d); k, v (batch, seq_k, K, d); lse (batch, H, seq_q) fp32. With
cu_seqlens (documents + 1,) q, k, v, out (tokens, heads, d); lse (H, tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(
    seq_q: int,
    seq_k: int,
    causal: bool,
    cu_seqlens: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """(seq_q, seq_k) bool: which key each query sees. The last query stands at the last key."""
    queries = torch.arange(seq_q, device=device)[:, None] + (seq_k - seq_q)
    keys = torch.arange(seq_k, device=device)[None, :]
    visible = keys <= queries if causal else torch.ones_like(keys <= queries)
    if window is not None:
        visible = visible & (keys > queries - window)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].long()
        document = torch.searchsorted(ends, torch.arange(seq_k, device=device), right=True)
        # Tokens after the last document belong to none, and see nothing.
        same = (document[:, None] == document[None, :]) & (document < len(ends))[:, None]
        visible = visible & same
    return visible


def _scores(
    q: Tensor, k: Tensor, causal: bool, cu_seqlens, window, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """s (batch, K, group, seq_q, seq_k), what is visible of it, and tanh(s / softcap)."""
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k) * scale
    capped = None if softcap is None else torch.tanh(scores / softcap)
    visible = visible_keys(q.shape[1], k.shape[1], causal, cu_seqlens, window, q.device)
    return scores if capped is None else softcap * capped, visible, capped


def _wide(tensor: Tensor, is_packed: bool) -> Tensor:
    """(batch, seq, heads, d) in fp32, or in fp64 where it came so."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor.unsqueeze(0) if is_packed else tensor


def _grouped(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """(batch, seq, H, d) -> (batch, seq, K, H / K, d)."""
    batch, seq, num_heads, head_dim = tensor.shape
    return tensor.reshape(batch, seq, num_kv_heads, num_heads // num_kv_heads, head_dim)


def attention_forward_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out in q's dtype and lse in fp32 (fp64 for fp64); autograd can pass through out."""
    is_packed = cu_seqlens is not None
    wide_q, wide_k, wide_v = (_wide(t, is_packed) for t in (q, k, v))
    wide_q = _grouped(wide_q, wide_k.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores, visible, _ = _scores(wide_q, wide_k, causal, cu_seqlens, window, scale, softcap)
    # Hidden scores are the lowest number, not -inf: a row that sees nothing stays finite so, and is
    # zeroed afterwards.
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1).masked_fill(~visible, 0.0)
    out = torch.einsum("bhgqk,bkhd->bqhgd", weights, wide_v).reshape(*q.shape)
    hidden = torch.full_like(scores, float("-inf"))
    lse = torch.logsumexp(torch.where(visible, scores, hidden).detach(), -1).flatten(1, 2)
    return out.to(q.dtype), lse.squeeze(0) if is_packed else lse


def attention_reference(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """out alone; options as of attention_forward_reference."""
    return attention_forward_reference(q, k, v, **options)[0]


def attention_backward_reference(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v; the scores are computed anew."""
    is_packed = cu_seqlens is not None
    wide_dout, wide_q, wide_k, wide_v, wide_out = (
        _wide(t, is_packed) for t in (dout, q, k, v, out)
    )
    num_kv_heads = wide_k.shape[2]
    wide_dout, wide_q, wide_out = (_grouped(t, num_kv_heads) for t in (wide_dout, wide_q, wide_out))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores, visible, capped = _scores(wide_q, wide_k, causal, cu_seqlens, window, scale, softcap)
    lse = (lse.unsqueeze(0) if is_packed else lse).unflatten(1, (num_kv_heads, -1))
    weights = torch.exp(scores - lse[..., None]).masked_fill(~visible, 0.0)
    dv = torch.einsum("bhgqk,bqhgd->bkhd", weights, wide_dout)
    delta = (wide_dout * wide_out).sum(-1).permute(0, 2, 3, 1)[..., None]
    dscores = weights * (torch.einsum("bqhgd,bkhd->bhgqk", wide_dout, wide_v) - delta)
    if capped is not None:
        dscores = dscores * (1 - capped.square())
    dq = torch.einsum("bhgqk,bkhd->bqhgd", dscores, wide_k) * scale
    dk = torch.einsum("bhgqk,bqhgd->bkhd", dscores, wide_q) * scale
    return (
        dq.reshape(*q.shape).to(q.dtype),
        dk.reshape(k.shape).to(k.dtype),
        dv.reshape(v.shape).to(v.dtype),
    )
