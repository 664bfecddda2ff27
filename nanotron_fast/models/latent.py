"""Multi-head latent attention (DeepSeek-V2, 2024) of a layer.

    c = norm(x Wqa^T);  q = c Wqb^T, or x Wq^T
    [d | r] = x Wkva^T;  [k | v] = norm(d) Wkvb^T, head by head
    y = attention([q | q turned], [k | r turned, the same for all heads], v) Wo^T

A head of a value may be shorter than one of a key: values get columns of zeros, and the output
loses them. Nothing of d is kept in place of keys and values.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanotron_fast.errors import TopologyError, UnsupportedModelError
from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.kernels.rope.apart import rope_apart
from nanotron_fast.model.spec import Attention as AttentionSpec
from nanotron_fast.models.batch import Batch
from nanotron_fast.models.weights import Setting, Weights
from nanotron_fast.parallel import column_linear, for_all_ranks, row_linear


class LatentAttention(nn.Module):
    """Takes and gives (tokens, hidden), or this rank's share of the tokens.

    `layer` is the layer's number, by which a cache knows it.
    """

    def __init__(self, attention: AttentionSpec, setting: Setting, layer: int) -> None:
        super().__init__()
        if attention.latent is None or attention.rotary is None:
            raise UnsupportedModelError(f"layer {layer}: latent attention without rotary rows")
        self.spec, self.setting, self.layer = attention, setting, layer
        self.latent, self.num_plain = attention.latent, attention.rotary[0]
        if self.latent.q_rank is None:
            self.q_proj = Weights()
        else:
            self.q_a_proj = Weights(may_have_bias=True)
            self.q_a_layernorm = Weights()
            self.q_b_proj = Weights()
        self.kv_a_proj = Weights(may_have_bias=True)
        self.kv_a_layernorm = Weights()
        self.kv_b_proj = Weights()
        self.o_proj = Weights(may_have_bias=True)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        spec, setting = self.spec, self.setting
        size = setting.ranks.size
        if spec.num_heads % size:
            raise TopologyError(f"{spec.num_heads} heads do not split over tp={size}")
        heads = spec.num_heads // size
        q, turned, k, v = self._projected(x, heads)
        q, q_turned = q.split((self.num_plain, spec.head_dim - self.num_plain), -1)
        cos, sin = setting.rotary.tables(spec, batch.max_positions, x.device)
        q_turned, keys = rope_apart(
            q_turned,
            turned[:, None, None],
            cos,
            sin,
            batch.position_ids,
            self.latent.rotates_neighbours,
        )
        q = torch.cat((q, q_turned), -1)
        k = torch.cat((k, keys[:, 0].expand(-1, heads, -1)), -1)
        v = F.pad(v, (0, spec.head_dim - self.latent.value_dim))
        if batch.cu_seqlens is None:
            q, k, v = (each.unflatten(0, (batch.size, batch.length)) for each in (q, k, v))
        if batch.cache is not None:
            k, v = batch.cache.extend(self.layer, k, v)
        out = attention(
            q,
            k,
            v,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=None if batch.cu_seqlens is None else batch.length,
            window=spec.window,
            scale=spec.scale,
            softcap=spec.softcap,
        )
        out = out[..., : self.latent.value_dim].reshape(-1, heads * self.latent.value_dim)
        out = row_linear(out, self.o_proj.weight, group=setting.group, mode=setting.mode)
        return out if self.o_proj.bias is None else out + self.o_proj.bias

    def _projected(self, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (tokens, heads, head_dim), what turns of keys (tokens, rows), keys without that,
        values. Tokens are all of them.
        """
        setting, latent = self.setting, self.latent
        columns = {"group": setting.group, "mode": setting.mode}
        if latent.q_rank is None:
            q = column_linear(x, self.q_proj.weight, **columns)
        else:
            q = F.linear(x, self.q_a_proj.weight, self.q_a_proj.bias)
            q = column_linear(self._normed(q, self.q_a_layernorm), self.q_b_proj.weight, **columns)
        compressed = F.linear(x, self.kv_a_proj.weight, self.kv_a_proj.bias)
        rest = compressed.shape[1] - latent.kv_rank
        compressed, turned = compressed.split((latent.kv_rank, rest), 1)
        normed = self._normed(compressed, self.kv_a_layernorm)
        kv = column_linear(normed, self.kv_b_proj.weight, **columns)
        k, v = kv.view(len(kv), heads, -1).split((self.num_plain, latent.value_dim), -1)
        return q.view(len(q), heads, -1), for_all_ranks(turned, **columns), k, v

    def _normed(self, x: Tensor, norm: Weights) -> Tensor:
        return cast(Tensor, rms_norm(x.contiguous(), norm.weight, self.latent.norm_eps))
