"""Rotary embedding of a packed [q | k | v] as operators, each around one launch.

Shapes are those of `rope`. cos, sin and position_ids are contiguous.
"""

from __future__ import annotations

from torch import Tensor

from nanotron_fast.kernels.rope.kernels import launch
from nanotron_fast.kernels.rope.reference import split_heads
from nanotron_fast.kernels.runtime.operators import operator


@operator("nanotron_fast::rope_qkv_forward")
def forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (tokens, H, d), k and v (tokens, K, d) in qkv's dtype."""
    sources = split_heads(qkv, num_q_heads, num_kv_heads, head_dim)
    outs = [qkv.new_empty(src.shape) for src in sources]
    launch(sources, outs, cos, sin, position_ids, inverse=False, interleaved=interleaved)
    return outs[0], outs[1], outs[2]


@forward.register_fake
def _(qkv, cos, sin, num_q_heads, num_kv_heads, head_dim, position_ids, interleaved):
    heads = (num_q_heads, num_kv_heads, num_kv_heads)
    return tuple(qkv.new_empty(qkv.shape[0], n, head_dim) for n in heads)


@operator("nanotron_fast::rope_qkv_backward")
def backward(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """dqkv (tokens, (H + 2K) * d) from gradients whose last dim is contiguous; one is there."""
    dqkv = _empty_packed(dq, dk, dv, num_q_heads, num_kv_heads, head_dim)
    outs = split_heads(dqkv, num_q_heads, num_kv_heads, head_dim)
    launch([dq, dk, dv], outs, cos, sin, position_ids, inverse=True, interleaved=interleaved)
    return dqkv


def _empty_packed(dq, dk, dv, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Tensor:
    given = next(grad for grad in (dq, dk, dv) if grad is not None)
    return given.new_empty(given.shape[0], (num_q_heads + 2 * num_kv_heads) * head_dim)


@backward.register_fake
def _(dq, dk, dv, cos, sin, num_q_heads, num_kv_heads, head_dim, position_ids, interleaved):
    return _empty_packed(dq, dk, dv, num_q_heads, num_kv_heads, head_dim)


@operator("nanotron_fast::rope_qkv_", mutates_args=("qkv",))
def in_place(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Turns q and k inside the packed tensor, back where `inverse` says so."""
    parts = split_heads(qkv, num_q_heads, num_kv_heads, head_dim)
    launch(
        parts,
        parts,
        cos,
        sin,
        position_ids,
        inverse=inverse,
        interleaved=interleaved,
        in_place=True,
    )
