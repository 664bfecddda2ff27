"""Launches of rope_qkv, rope_apart and rope_normed to compile."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch

from nanotron_fast.kernels.rope import rope_qkv, rope_qkv_, rope_qkv_backward_, rope_tables
from nanotron_fast.kernels.rope.apart import rope_apart
from nanotron_fast.kernels.rope.normed import rope_normed

FILES = ("rope.kernels", "rope.normed_kernels")

# (query heads, key heads, head_dim, share that turns): Llama-3-8B, SmolLM, Phi-2, Gemma, odd ones.
SHAPES = [
    (32, 8, 128, 1.0),
    (9, 3, 64, 1.0),
    (32, 32, 80, 0.4),
    (8, 1, 256, 1.0),
    (12, 4, 24, 1.0),
    (2, 1, 8, 1.0),
]


def _step(
    dtype: torch.dtype,
    heads: tuple[int, int, int, float],
    interleaved: bool,
    has_positions: bool = True,
) -> None:
    num_q_heads, num_kv_heads, head_dim, share = heads
    sizes = (num_q_heads, num_kv_heads, head_dim)
    cos, sin = rope_tables(head_dim, 64, partial_rotary_factor=share)
    position_ids = torch.zeros(64, dtype=torch.int64) if has_positions else None
    rest = (cos, sin, *sizes, position_ids, interleaved)
    qkv = torch.empty(64, (num_q_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    qkv.requires_grad_()
    q, k, v = rope_qkv(qkv, *rest)
    (q.sum() + k.sum() + v.sum()).backward()
    q, k, v = rope_qkv(qkv, *rest)
    k.sum().backward()
    packed = qkv.detach()
    rope_qkv_(packed, *rest)
    rope_qkv_backward_(packed, *rest)


def _apart(dtype: torch.dtype, heads: tuple[int, int, int, float], num_beside: int) -> None:
    num_q_heads, num_kv_heads, head_dim, share = heads
    cos, sin = rope_tables(head_dim, 64, partial_rotary_factor=share)
    q = torch.empty(64, num_q_heads, head_dim, dtype=dtype, requires_grad=True)
    kv = torch.empty(64, num_beside, num_kv_heads, head_dim, dtype=dtype, requires_grad=True)
    for which in (slice(None), slice(1)):
        sum(x.sum() for x in rope_apart(q, kv, cos, sin)[which]).backward()


def _normed(
    dtype: torch.dtype,
    heads: tuple[int, int, int, float],
    interleaved: bool,
    has_positions: bool = True,
) -> None:
    num_q_heads, num_kv_heads, head_dim, share = heads
    cos, sin = rope_tables(head_dim, 64, partial_rotary_factor=share)
    shapes = ((64, num_q_heads, head_dim), (64, num_kv_heads, head_dim), (head_dim,), (head_dim,))
    given = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    positions = torch.zeros(64, dtype=torch.int64) if has_positions else None
    outs = rope_normed(*given, cos, sin, position_ids=positions, interleaved=interleaved)
    sum(x.sum() for x in outs).backward()


CASES = [
    *(partial(_step, torch.bfloat16, *case) for case in product(SHAPES, (False, True))),
    partial(_step, torch.bfloat16, SHAPES[0], False, has_positions=False),
    partial(_step, torch.float16, SHAPES[0], False),
    partial(_step, torch.float32, SHAPES[0], True),
    *(partial(_apart, torch.bfloat16, *case) for case in product(SHAPES[:3], (1, 2))),
    partial(_apart, torch.float32, SHAPES[0], 1),
    *(partial(_normed, torch.bfloat16, *case) for case in product(SHAPES, (False, True))),
    # Strides that are multiples of 8, but not of 16.
    partial(_normed, torch.bfloat16, (3, 1, 24, 1.0), True),
    partial(_normed, torch.bfloat16, SHAPES[0], False, has_positions=False),
    partial(_normed, torch.float32, SHAPES[0], False),
]
