"""The attention of a tensor-parallel layer as one function, from its input shard to its output.

    [q | k | v] = x Wqkv^T + b;  q, k rotated;  y = sum over ranks of attention(q, k, v) Wo^T

Saved for backward: x's shard, attention's output and log-sum-exp, and the packed QKV after rotary
unless it is recomputed from x. Rotary works in place of the packed tensor, and attention reads q, k
and v as views of it: they are never copied apart. Their gradients are packed by the pass that turns
them back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nanotron_fast.errors import TopologyError
from nanotron_fast.kernels.attention import attention_backward, attention_forward
from nanotron_fast.kernels.matmul import matmul_rope, prefers_fused
from nanotron_fast.kernels.rope import rope_qkv_, rope_qkv_backward
from nanotron_fast.kernels.runtime.autocast import as_autocast
from nanotron_fast.kernels.runtime.collectives import Group, Ranks, resolve
from nanotron_fast.kernels.runtime.main_grad import main_gradients
from nanotron_fast.kernels.runtime.once import once_differentiable
from nanotron_fast.kernels.runtime.rows import as_row_of_ids
from nanotron_fast.parallel.chunks import AS_THEY_ARE, Order
from nanotron_fast.parallel.communication import check_mode, start_all_gather
from nanotron_fast.parallel.products import (
    bias_gradient,
    gather_linear,
    input_gradient,
    linear_all_reduce,
    linear_scatter,
    weight_gradient,
)


@dataclass(frozen=True)
class _Layout:
    """What does not change between forward and backward. Heads are this rank's."""

    ranks: Ranks
    mode: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int
    max_seqlen: int | None
    window: int | None
    scale: float | None
    softcap: float | None
    interleaved: bool
    sequence_first: bool

    @property
    def turning(self) -> dict[str, Any]:
        """What rotary embedding is told of the heads."""
        return {
            "num_q_heads": self.num_q_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "interleaved": self.interleaved,
        }

    @property
    def scatters(self) -> bool:
        return self.mode == "reduce_scatter" and self.ranks.size > 1

    def split(self, packed: Tensor, is_varlen: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Views of packed (tokens, (H+2K)*d) as attention takes them."""
        q_heads, kv_heads = self.num_q_heads, self.num_kv_heads
        views = self.by_sequence(packed, q_heads + 2 * kv_heads, is_varlen)
        q, k, v = views.split([q_heads, kv_heads, kv_heads], dim=-2)
        return q, k, v

    def by_sequence(self, rows: Tensor, num_heads: int, is_varlen: bool) -> Tensor:
        """A view of rows (tokens, heads * d): (batch, seq, heads, d), or (tokens, heads, d)."""
        if is_varlen:
            return rows.view(rows.shape[0], num_heads, self.head_dim)
        seq = rows.shape[0] // self.batch
        if self.sequence_first:
            return rows.view(seq, self.batch, num_heads, self.head_dim).transpose(0, 1)
        return rows.view(self.batch, seq, num_heads, self.head_dim)

    def in_order(self, heads: Tensor) -> Tensor:
        """A view of what attention gives, (..., heads, d), with the tokens in their order."""
        return heads.transpose(0, 1) if heads.dim() == 4 and self.sequence_first else heads

    def as_rows(self, out: Tensor) -> Tensor:
        """The way back, a copy where the sequence comes first: (tokens, heads * d)."""
        out = self.in_order(out)
        return out.reshape(-1, out.shape[-2] * out.shape[-1])

    def options(self, cu_seqlens: Tensor | None) -> dict[str, Any]:
        """Those of `kernels.attention`."""
        return {
            "causal": True,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": self.max_seqlen,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
        }


class _Rotary(NamedTuple):
    """The tables and each token's row in them; rows 0, 1, 2, ... where position_ids is None."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor | None


def _qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rotary: _Rotary,
    layout: _Layout,
    *,
    keeps_gathered: bool,
) -> tuple[Tensor, Tensor | None, Order]:
    """Packed QKV after rotary, the gathered x if it is to be kept, and its rows' order."""
    turning: dict[str, Any] = {**layout.turning, "position_ids": rotary.position_ids}
    if layout.scatters:
        # All ranks must communicate alike, and each measures the fused product for itself.
        packed, whole, order = gather_linear(
            x, weight, bias, layout.ranks, keeps_gathered=keeps_gathered
        )
    elif prefers_fused(
        "rope",
        tokens=x.shape[0],
        hidden=x.shape[1],
        out=weight.shape[0],
        dtype=x.dtype,
        device=x.device,
    ):
        packed = matmul_rope(x, weight, bias, rotary.cos, rotary.sin, **turning)
        return packed, x, AS_THEY_ARE
    else:
        packed, whole, order = torch.nn.functional.linear(x, weight, bias), x, AS_THEY_ARE
    return rope_qkv_(packed, rotary.cos, rotary.sin, **turning), whole, order


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        o_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        layout: _Layout,
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        rotary = _Rotary(cos, sin, position_ids)
        packed, _, _ = _qkv(x, qkv_weight, qkv_bias, rotary, layout, keeps_gathered=False)
        q, k, v = layout.split(packed, cu_seqlens is not None)
        out, lse = attention_forward(q, k, v, **layout.options(cu_seqlens))
        ctx.save_for_backward(
            *(x, qkv_weight, qkv_bias, o_weight, cos, sin, position_ids, cu_seqlens),
            *(None if recompute else packed, out, lse),
        )
        ctx.main_grads = main_gradients(qkv_weight, qkv_bias, o_weight)
        ctx.layout = layout
        ctx.mark_non_differentiable(lse)
        product = linear_scatter if layout.scatters else linear_all_reduce
        return product(layout.as_rows(out), o_weight, None, layout.ranks), lse

    @staticmethod
    @once_differentiable("tensor_parallel_attention")
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, o_weight, cos, sin, position_ids, cu_seqlens, packed, out, lse = (
            ctx.saved_tensors
        )
        layout: _Layout = ctx.layout
        needs_x, needs_qkv, needs_bias, needs_o = ctx.needs_input_grad[:4]
        rotary = _Rotary(cos, sin, position_ids)
        dy = dy.contiguous()
        gathering, x_order, dy_order = None, AS_THEY_ARE, AS_THEY_ARE
        regathers = layout.scatters and packed is not None and needs_qkv
        if packed is None:
            packed, x, x_order = _qkv(x, weight, bias, rotary, layout, keeps_gathered=needs_qkv)
        if layout.scatters:
            d_out, dy, dy_order = gather_linear(
                dy, o_weight.t(), None, layout.ranks, keeps_gathered=needs_o
            )
            # Behind dy, which is needed first: beside attention's backward.
            if regathers:
                gathering = start_all_gather(x, layout.ranks)
        else:
            d_out = dy @ o_weight
        is_varlen = cu_seqlens is not None
        q, k, v = layout.split(packed, is_varlen)
        d_out = layout.by_sequence(d_out, layout.num_q_heads, is_varlen)
        gradients = attention_backward(d_out, q, k, v, out, lse, **layout.options(cu_seqlens))
        del packed, q, k, v
        # The libraries' kernels write dq, dk and dv to tensors of their own. One pass packs them
        # and turns them back: 4 bytes for each of the (H + 2K) * d elements of a token, where
        # copies and a turn in place would take 8 of q and k. Gradients written straight to the
        # packed tensor would save the 4 of v alone, for q and k would be turned all the same.
        d_packed = rope_qkv_backward(
            *(layout.in_order(gradient) for gradient in gradients),
            cos,
            sin,
            position_ids=position_ids,
            interleaved=layout.interleaved,
        )
        del gradients
        dx = d_weight = d_bias = d_o = None
        if needs_x:
            dx = input_gradient(
                *(d_packed, weight, layout.mode, layout.ranks),
                is_early=gathering is None,
                is_last=not (needs_o or needs_qkv),
            )
        if needs_o:
            rows = dy_order.arranged(layout.as_rows(out))
            d_o = weight_gradient(dy, rows, ctx.main_grads[2])
        if needs_bias:
            d_bias = bias_gradient(d_packed, ctx.main_grads[1])
        if needs_qkv:
            x = x if gathering is None else gathering.wait()
            d_weight = weight_gradient(x_order.arranged(d_packed), x, ctx.main_grads[0])
        dx = None if dx is None else dx.wait()
        return dx, d_weight, d_bias, d_o, None, None, None, None, None, None


def _document_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """0, 1, 2, ... from each document's start: (tokens,)."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    documents = torch.searchsorted(cu_seqlens, tokens, right=True, out_int32=True) - 1
    return tokens - cu_seqlens[documents.clamp_min(0)]


def heads_of_rank(num_heads: int, num_kv_heads: int, size: int) -> tuple[int, int]:
    """The query heads and the key-value heads of each of `size` ranks.

    Ranks that outnumber the key-value heads have a copy of one. Raises TopologyError.
    """
    if num_heads % size:
        raise TopologyError(f"num_q_heads {num_heads} does not split over tp={size}")
    if num_kv_heads % size == 0:
        return num_heads // size, num_kv_heads // size
    if size % num_kv_heads:
        more = f", and {size} ranks cannot have equally many copies" if size > num_kv_heads else ""
        raise TopologyError(f"num_kv_heads {num_kv_heads} does not split over tp={size}{more}")
    return num_heads // size, 1


def _positions(
    x: Tensor, cu_seqlens: Tensor | None, num_tokens: int, batch: int, sequence_first: bool
) -> Tensor | None:
    """Each token's place in its sequence or document; None where that is 0, 1, 2, ..."""
    if cu_seqlens is not None:
        return _document_positions(cu_seqlens, num_tokens)
    if batch == 1:
        return None
    row = torch.arange(num_tokens // batch, device=x.device)
    return row.repeat_interleave(batch) if sequence_first else row.repeat(batch)


def tensor_parallel_attention(
    x: Tensor,
    qkv_weight: Tensor,
    o_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    batch: int = 1,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    qkv_bias: Tensor | None = None,
    group: Group = None,
    mode: str = "all_reduce",
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    sequence_first: bool = False,
    recompute: bool = True,
    lse_to: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Causal self-attention with rotary embedding, its heads split over a group.

    Args:
        x: (tokens, hidden), the same on every rank; with mode "reduce_scatter" (tokens / size,
            hidden), this rank's tokens. Tokens are batch-major (batch x sequence) unless
            `sequence_first`.
        qkv_weight: ((H + 2K) * d / size, hidden), this rank's rows packed [q | k | v]. Where a
            size that K divides is larger than K: (H * d / size + 2d, hidden), rank r with a copy of
            key-value head r * K // size. Its gradient is of this rank's queries alone: that of the
            head is the sum over the ranks that have it.
        o_weight: (hidden, H * d / size), this rank's columns. Parameters that have a `main_grad`
            (fp32, their shape) get their gradients added to it, and `grad` stays None. With
            "reduce_scatter" one requires a gradient on all ranks or on none.
        cos, sin: (positions, rotary_dim / 2) fp32, see `kernels.rope.rope_tables`.
        num_q_heads, num_kv_heads: H and K of the whole model.
        head_dim: d.
        batch: sequences of equal length in x; 1 with `cu_seqlens`.
        cu_seqlens: (documents + 1,) int32, where documents start and end among all tokens.
            Positions start again in each of them, unless `position_ids` says otherwise.
        max_seqlen: the longest document's length, if known.
        qkv_bias: as many as qkv_weight has rows.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for a rank alone.
        mode: "all_reduce" or "reduce_scatter" (sequence parallelism).
        window: how many tokens a token sees at most, itself included.
        scale: of the scores; head_dim ** -0.5 by default.
        softcap: softcap * tanh(s / softcap) in place of the scores s.
        interleaved: rotary pairs are neighbours (2i, 2i + 1), not halves.
        position_ids: (tokens,) of any integer dtype, each token's row in the tables, on every
            rank for all tokens; None: counted from the start of its sequence or document, by every
            call anew where there are several. A model of many layers counts once, and gives them.
        sequence_first: tokens are sequence x batch, as Nanotron's Llama has them.
        recompute: save x alone and compute QKV again in backward.
        lse_to: is called with the logarithm of each query's sum of weights: fp32 without a
            gradient, (batch, H / size, seq), or (H / size, tokens) with `cu_seqlens`.

    Returns:
        x's shape and dtype; autocast's dtype where it is on.

    Raises:
        ValueError: shapes do not fit. TopologyError: heads or tokens do not split over the group.
    """
    check_mode(mode)
    ranks = resolve(group)
    size = ranks.size
    q_heads, kv_heads = heads_of_rank(num_q_heads, num_kv_heads, size)
    rows = (q_heads + 2 * kv_heads) * head_dim
    columns = num_q_heads * head_dim // size
    hidden, bias_shape = x.shape[-1], (rows,) if qkv_bias is None else qkv_bias.shape
    shapes = (qkv_weight.shape, o_weight.shape, bias_shape)
    if x.dim() != 2 or shapes != ((rows, hidden), (hidden, columns), (rows,)):
        raise ValueError(
            f"tensor_parallel_attention: x {tuple(x.shape)}, qkv_weight {tuple(qkv_weight.shape)}, "
            f"o_weight {tuple(o_weight.shape)}, qkv_bias {tuple(bias_shape)} for {num_q_heads} and "
            f"{num_kv_heads} heads of {head_dim} over tp={size}: they should be (tokens, hidden), "
            f"({rows}, hidden), (hidden, {columns}) and ({rows},)"
        )
    num_tokens = x.shape[0] * (size if mode == "reduce_scatter" else 1)
    if batch < 1 or num_tokens % batch or (cu_seqlens is not None and batch != 1):
        raise ValueError(
            f"tensor_parallel_attention: batch {batch} for {num_tokens} tokens"
            + (" and cu_seqlens, which takes batch 1" if cu_seqlens is not None else "")
        )
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or len(cu_seqlens) == 0):
        raise ValueError(f"tensor_parallel_attention: cu_seqlens {tuple(cu_seqlens.shape)}")
    if position_ids is None:
        position_ids = _positions(x, cu_seqlens, num_tokens, batch, sequence_first)
    elif position_ids.shape != (num_tokens,) or position_ids.is_floating_point():
        raise ValueError(
            f"tensor_parallel_attention: position_ids {tuple(position_ids.shape)} "
            f"{position_ids.dtype} for {num_tokens} tokens"
        )
    else:
        position_ids = as_row_of_ids(position_ids)
    layout = _Layout(
        ranks=ranks,
        mode=mode,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        batch=batch,
        max_seqlen=max_seqlen,
        window=window,
        scale=scale,
        softcap=softcap,
        interleaved=interleaved,
        sequence_first=sequence_first,
    )
    operands = as_autocast(x, qkv_weight, qkv_bias, o_weight)
    y, lse = _Attention.apply(*operands, cos, sin, position_ids, cu_seqlens, layout, recompute)
    if lse_to is not None:
        lse_to(lse)
    return cast(Tensor, y)
