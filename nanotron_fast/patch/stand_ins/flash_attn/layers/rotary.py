"""flash_attn.layers.rotary of 2.6: the rotary embedding that Nanotron's attention holds.

    (a, b) -> (a * cos - b * sin,  b * cos + a * sin)    in fp32, rounded once

The tables have the dtype of the activations, as flash-attn's have: in bf16 they carry its rounding.
One thing is different: the real one writes over its arguments and returns them; here the result is
new and the arguments are left alone, also where inplace=True asks for the other.

Shapes: q, x (batch, seq, H, d), kv (batch, seq, 2, K, d), qkv (batch, seq, 3, H, d); cos, sin
(positions, rotary_dim/2). seqlen_offsets: the position of the first token, int or (batch,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanotron_fast.kernels.backend import uses_triton
from nanotron_fast.kernels.rope import rope_qkv_reference
from nanotron_fast.kernels.rope_kernels import launch
from nanotron_fast.patch.stand_ins.arguments import refuse


def _launch(
    sources: Sequence[Tensor | None],
    shapes: Sequence[torch.Size],
    tables: Sequence[Tensor],
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """One launch: reads q and kv where they lie, turns q and k, takes v along; one is there."""
    q, kv = (
        each if each is None or each.stride(-1) == 1 else each.contiguous() for each in sources
    )
    given = next(each for each in (q, kv) if each is not None)
    q_out, kv_out = (given.new_empty(shape) for shape in shapes)
    k, v = (None, None) if kv is None else kv.unbind(1)
    cos, sin, positions = tables
    destinations = [q_out, *kv_out.unbind(1)]
    launch([q, k, v], destinations, cos, sin, positions, inverse=inverse, interleaved=interleaved)
    return q_out, kv_out


class _Turn(torch.autograd.Function):
    """q (tokens, H, d) and kv (tokens, 2, K, d) on a GPU; positions (tokens,)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved, ctx.shapes = interleaved, (q.shape, kv.shape)
        ctx.set_materialize_grads(False)
        return _launch((q, kv), ctx.shapes, (cos, sin, positions), interleaved, inverse=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 6
        outs = _launch(grads, ctx.shapes, ctx.saved_tensors, ctx.interleaved, inverse=True)
        return *outs, None, None, None, None


def _turn(
    q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """q (tokens, H, d) and kv (tokens, 2, K, d) with q and k turned."""
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(wide).contiguous(), sin.to(wide).contiguous()
    if uses_triton(q) and wide == torch.float32:
        return _Turn.apply(q, kv, cos, sin, positions, interleaved)
    num_heads, (num_kv_heads, head_dim) = q.shape[1], kv.shape[2:]
    packed = torch.cat((q.flatten(1), kv.flatten(1)), dim=1)
    sizes = (num_heads, num_kv_heads, head_dim)
    q, k, v = rope_qkv_reference(packed, cos, sin, *sizes, positions, interleaved)
    return q, torch.stack((k, v), dim=1)


def _positions(batch: int, seq: int, offsets: int | Tensor, device: torch.device) -> Tensor:
    """(batch * seq,) int64: where each token stands."""
    if isinstance(offsets, Tensor):
        offsets = offsets[:, None]
    return (torch.arange(seq, device=device) + offsets).expand(batch, seq).flatten()


def _packed_positions(cu_seqlens: Tensor, total: int, offsets: int | Tensor) -> Tensor:
    """(total,) int64: where each token stands in its document."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:-1].long(), tokens, right=True)
    if isinstance(offsets, Tensor):
        offsets = offsets[document]
    return tokens - cu_seqlens.long()[document] + offsets


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x with its first rotary_dim columns turned; x (tokens, H, d) with cu_seqlens."""
    if cu_seqlens is None:
        end = x.shape[1] + (seqlen_offsets if isinstance(seqlen_offsets, int) else 0)
        if end > len(cos):
            raise ValueError(f"apply_rotary_emb: {end} positions, tables for {len(cos)}")
        positions = _positions(x.shape[0], x.shape[1], seqlen_offsets, x.device)
        rows = x.flatten(0, 1)
    else:
        positions = _packed_positions(cu_seqlens, len(x), seqlen_offsets)
        rows = x
    # The kernel turns queries and keys together: one head of the queries serves it as a key.
    spare = rows.detach()[:, None, :1].expand(-1, 2, -1, -1)
    return _turn(rows, spare, cos, sin, positions, interleaved)[0].view(x.shape)


apply_rotary_emb_func = apply_rotary_emb


class RotaryEmbedding(nn.Module):
    """Rotary embedding (RoFormer, Su et al., 2021) with tables that grow with the sequences."""

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        pos_idx_in_fp32: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        refuse("RotaryEmbedding", scale_base=scale_base is not None)
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.pos_idx_in_fp32 = pos_idx_in_fp32
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        # XPos's, which is refused. Nanotron's subclass looks at them.
        self.scale_base = None
        self.register_buffer("scale", None, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return 1.0 / self.base**exponents

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes tables for that many positions, unless there are such. Nanotron overrides it."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and (cached.device, cached.dtype) == (device, dtype)
            and not (self.training and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        frequencies = self.inv_freq
        if self.pos_idx_in_fp32 and frequencies.dtype != torch.float32:
            # A model cast to bf16 has cast this buffer too.
            frequencies = self._compute_inv_freq(device)
        angles = torch.outer(
            torch.arange(seqlen, device=device, dtype=frequencies.dtype), frequencies
        )
        self._cos_cached, self._sin_cached = angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """qkv (batch, seq, 3, H, d), or q (batch, seq, H, d) beside kv (batch, seq, 2, K, d).

        A seqlen_offset for each sequence needs max_seqlen, the positions that there can be.
        """
        batch, seq = qkv.shape[:2]
        if max_seqlen is None and isinstance(seqlen_offset, int):
            max_seqlen = seq + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError("RotaryEmbedding: a seqlen_offset tensor needs max_seqlen")
        q, pair = (qkv[:, :, 0], qkv[:, :, 1:]) if kv is None else (qkv, kv)
        positions = _positions(batch, seq, seqlen_offset, qkv.device)
        turned_q, turned_kv = _turn(
            *(q.flatten(0, 1), pair.flatten(0, 1)), cos, sin, positions, self.interleaved
        )
        if kv is None:
            return torch.cat((turned_q[:, None], turned_kv), dim=1).view(qkv.shape)
        return turned_q.view(q.shape), turned_kv.view(kv.shape)
