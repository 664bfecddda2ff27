"""A rank of test_blocks.py: the fused MLP and attention against the whole ones, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.rope import rope_qkv_reference
from nanotron_fast.parallel import tensor_parallel_attention, tensor_parallel_mlp
from tests.parallel.ranks import check, join, leaf, run_cases, shard, with_chunks

HIDDEN, INTER, TOKENS = 12, 16, 24
Q_HEADS, KV_HEADS, HEAD_DIM = 8, 4, 16
MODES = ("all_reduce", "reduce_scatter")


def whole_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def mlp(mode: str, recompute: bool, group) -> None:
    x, dy = torch.randn(TOKENS, HIDDEN).double(), torch.randn(TOKENS, HIDDEN).double()
    weights = [torch.randn(2 * INTER, HIDDEN).double(), torch.randn(HIDDEN, INTER).double()]
    whole = [leaf(t) for t in (x, *weights)]
    y = whole_mlp(*whole)
    y.backward(dy)
    is_sharded = mode == "reduce_scatter"
    gate_up, down = leaf(shard(weights[0], 0, [INTER, INTER])), leaf(shard(weights[1], 1))
    mine = leaf(shard(x, 0) if is_sharded else x)
    ours = tensor_parallel_mlp(mine, gate_up, down, group=group, mode=mode, recompute=recompute)
    check(ours, shard(y, 0) if is_sharded else y, "output")
    ours.backward(shard(dy, 0) if is_sharded else dy)
    check(mine.grad, shard(whole[0].grad, 0) if is_sharded else whole[0].grad, "dx")
    check(gate_up.grad, shard(whole[1].grad, 0, [INTER, INTER]), "d gate_up")
    check(down.grad, shard(whole[2].grad, 1), "d down")


def whole_attention(x, weight, bias, o_weight, cos, sin, positions, batch, documents, window):
    """Attention of each sequence or document by itself."""
    packed = F.linear(x, weight, bias)
    q, k, v = rope_qkv_reference(packed, cos, sin, Q_HEADS, KV_HEADS, HEAD_DIM, positions)
    edges = documents or [i * TOKENS // batch for i in range(batch + 1)]
    outs = [
        attention(q[None, a:b], k[None, a:b], v[None, a:b], window=window, backend="torch")[0]
        for a, b in pairwise(edges)
    ]
    return F.linear(torch.cat(outs).flatten(1), o_weight)


def attend(mode: str, recompute: bool, batch: int, documents, window, bias, group) -> None:
    x, dy = torch.randn(TOKENS, HIDDEN).double(), torch.randn(TOKENS, HIDDEN).double()
    sections = [Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    weight = torch.randn(sum(sections), HIDDEN).double() / 4
    b = torch.randn(sum(sections)).double() if bias else None
    o_weight = torch.randn(HIDDEN, Q_HEADS * HEAD_DIM).double()
    angles = torch.rand(TOKENS, HEAD_DIM // 2) * 6
    cos, sin = angles.cos(), angles.sin()
    edges = documents or [i * TOKENS // batch for i in range(batch + 1)]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(edges)])
    whole = [None if t is None else leaf(t) for t in (x, weight, b, o_weight)]
    y = whole_attention(*whole, cos, sin, positions, batch, documents, window)
    y.backward(dy)

    is_sharded = mode == "reduce_scatter"
    mine = leaf(shard(x, 0) if is_sharded else x)
    qkv_weight, o = leaf(shard(weight, 0, sections)), leaf(shard(o_weight, 1))
    qkv_bias = leaf(shard(b, 0, sections)) if bias else None
    cu_seqlens = torch.tensor(documents, dtype=torch.int32) if documents else None
    ours = tensor_parallel_attention(
        *(mine, qkv_weight, o, cos, sin),
        num_q_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        batch=batch,
        cu_seqlens=cu_seqlens,
        qkv_bias=qkv_bias,
        group=group,
        mode=mode,
        window=window,
        recompute=recompute,
    )
    # Log-sum-exp is kept in fp32, whatever the rest is in.
    check(ours, shard(y, 0) if is_sharded else y, "output", 1e-6)
    ours.backward(shard(dy, 0) if is_sharded else dy)
    check(mine.grad, shard(whole[0].grad, 0) if is_sharded else whole[0].grad, "dx", 1e-6)
    check(qkv_weight.grad, shard(whole[1].grad, 0, sections), "d qkv", 1e-6)
    if bias:
        check(qkv_bias.grad, shard(whole[2].grad, 0, sections), "d bias", 1e-6)
    check(o.grad, shard(whole[3].grad, 1), "d o", 1e-6)


def cases(group) -> Iterator[tuple[str, Callable[[], None]]]:
    for mode, recompute in product(MODES, (False, True)):
        for name, wrap in (("", lambda case: case()), ("in chunks", with_chunks)):
            case = partial(mlp, mode, recompute, group)
            yield f"mlp {name} {mode} {recompute}", partial(wrap, case)
            for batch, documents, window, bias in (
                (1, None, None, True),
                (3, None, None, False),
                (2, None, 5, True),
                (1, [0, 7, 7, 8, 24], None, True),
            ):
                case = partial(attend, mode, recompute, batch, documents, window, bias, group)
                title = f"attention {name} {mode} {recompute} {batch} {documents}"
                yield title, partial(wrap, case)


if __name__ == "__main__":
    group = join()
    run_cases(cases(group))
