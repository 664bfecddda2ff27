"""flash_attn.layers.rotary of 2.6: the rotary embedding that Nanotron's attention holds.

    (a, b) -> (a * cos - b * sin,  b * cos + a * sin)    in fp32, rounded once

The tables have the dtype of the activations, as flash-attn's have: in bf16 they carry its rounding.
One thing is different: the real one writes over its arguments and returns them; here the result is
new and the arguments are left alone, also where inplace=True asks for the other.

Shapes: q, x (batch, seq, H, d), kv (batch, seq, 2, K, d), qkv (batch, seq, 3, H, d); cos, sin
(positions, rotary_dim/2). seqlen_offsets: the position of the first token, int or (batch,).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanotron_fast.kernels.rope.apart import rope_apart
from nanotron_fast.patch.stand_ins.arguments import refuse


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
    spare = rows.detach()[:, None, :1]
    turned, _ = rope_apart(rows, spare, cos, sin, positions, interleaved)
    return turned.view(x.shape)


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
        turned_q, turned_kv = rope_apart(
            *(q.flatten(0, 1), pair.flatten(0, 1)), cos, sin, positions, self.interleaved
        )
        if kv is None:
            return torch.cat((turned_q[:, None], turned_kv), dim=1).view(qkv.shape)
        return turned_q.view(q.shape), turned_kv.view(kv.shape)
