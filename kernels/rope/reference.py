"""Rotary embedding in plain torch, at least in fp32; what CPU tensors take."""

from __future__ import annotations

import torch
from torch import Tensor


def split_heads(qkv: Tensor, num_q_heads: int, num_kv_heads: int, head_dim: int) -> list[Tensor]:
    """Views (tokens, heads, head_dim) of q, k and v in a packed tensor."""
    heads = (num_q_heads, num_kv_heads, num_kv_heads)
    # As torch's own methods do it: unflatten and split are written in Python.
    packed = qkv.view(qkv.shape[0], sum(heads), head_dim)
    return list(packed.split_with_sizes(heads, dim=1))


def pack_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (..., H, d), k and v (..., K, d) -> (tokens, (H + 2K) * d), each copied once."""
    heads = (q.shape[-2], k.shape[-2], v.shape[-2])
    packed = q.new_empty(*q.shape[:-2], sum(heads), q.shape[-1])
    for part, source in zip(packed.split_with_sizes(heads, dim=-2), (q, k, v), strict=True):
        part.copy_(source)
    return packed.flatten(-2).flatten(0, -2)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (tokens, heads, head_dim), cos and sin (tokens, rotary_dim/2)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    pairs = turning.unflatten(-1, (half, 2) if interleaved else (2, half))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1 if interleaved else -2)
    return torch.cat((turned.flatten(-2).to(x.dtype), rest), -1)


def rope_qkv_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_qkv`, with its arguments."""
    if position_ids is None:
        cos, sin = cos[: qkv.shape[0]], sin[: qkv.shape[0]]
    else:
        cos, sin = cos.index_select(0, position_ids), sin.index_select(0, position_ids)
    q, k, v = split_heads(qkv, num_q_heads, num_kv_heads, head_dim)
    q, k = (rotate_reference(x, cos, sin, interleaved) for x in (q, k))
    return q, k, v.clone(memory_format=torch.contiguous_format)


def rotate_in_place(
    heads: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> None:
    """Turns heads (tokens, heads, head_dim), which are of the tables' dtype and may be a view.

    To the bits that `rotate_reference` gives, without its copies of the whole.
    """
    if position_ids is None:
        cos, sin = cos[: heads.shape[0]], sin[: heads.shape[0]]
    else:
        cos, sin = cos.index_select(0, position_ids), sin.index_select(0, position_ids)
    cos, sin, half = cos[:, None], sin[:, None], cos.shape[-1]
    pairs = heads[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = (a * cos).sub_(b * sin)
    b.mul_(cos).add_(a * sin)
    a.copy_(turned)
