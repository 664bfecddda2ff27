"""Grouped-query attention of a layer, from its normalised input to what it adds to the stream."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.attention.sinks import attention_with_sinks
from nanotron_fast.kernels.rope.apart import rope_apart
from nanotron_fast.kernels.rope.normed import rope_normed
from nanotron_fast.model.spec import Attention as AttentionSpec
from nanotron_fast.models.batch import Batch
from nanotron_fast.models.weights import Setting, Weights
from nanotron_fast.parallel import (
    column_linear,
    rms_norm_over_ranks,
    row_linear,
    tensor_parallel_attention,
)
from nanotron_fast.parallel.attention import heads_of_rank


class Attention(nn.Module):
    """Takes and gives (tokens, hidden), or this rank's share of the tokens.

    `layer` is the layer's number, by which a cache knows it.
    """

    def __init__(self, attention: AttentionSpec, setting: Setting, layer: int) -> None:
        super().__init__()
        self.spec, self.setting, self.layer = attention, setting, layer
        self.add_module(setting.names.qkv, Weights(may_have_bias=True))
        self.add_module(setting.names.output, Weights(may_have_bias=True))
        if attention.has_sinks:
            self.register_parameter("sinks", None)
        if attention.qk_norm:
            self.q_norm = Weights()
            self.k_norm = Weights()

    sinks: nn.Parameter

    @property
    def _qkv(self) -> Weights:
        return cast(Weights, self.get_submodule(self.setting.names.qkv))

    @property
    def _output(self) -> Weights:
        return cast(Weights, self.get_submodule(self.setting.names.output))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        packs_by_kv_head = self.setting.names.packs_by_kv_head
        is_plain = not (self.spec.qk_norm or self.spec.has_sinks or packs_by_kv_head)
        is_fused = is_plain and batch.cache is None
        out = self._fused(x, batch) if is_fused else self._in_steps(x, batch)
        # Every rank has the whole bias, and adds it once: after the sum over ranks.
        bias = self._output.bias
        return out if bias is None else out + bias

    def _fused(self, x: Tensor, batch: Batch) -> Tensor:
        spec, setting = self.spec, self.setting
        cos, sin = setting.rotary.tables(spec, batch.max_positions, x.device)
        return tensor_parallel_attention(
            x,
            self._qkv.weight,
            self._output.weight,
            cos,
            sin,
            num_q_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            batch=batch.size if batch.cu_seqlens is None else 1,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=None if batch.cu_seqlens is None else batch.length,
            qkv_bias=self._qkv.bias,
            group=setting.group,
            mode=setting.mode,
            window=spec.window,
            scale=spec.scale,
            softcap=spec.softcap,
            interleaved=setting.interleaved,
            recompute=setting.recompute,
        )

    def _in_steps(self, x: Tensor, batch: Batch) -> Tensor:
        """Where something is between projections and rotary embedding, or there is a cache."""
        spec, setting = self.spec, self.setting
        parallel = {"group": setting.group, "mode": setting.mode}
        packed = column_linear(x, self._qkv.weight, self._qkv.bias, **parallel)
        heads, kv_heads = heads_of_rank(spec.num_heads, spec.num_kv_heads, setting.ranks.size)
        if setting.names.packs_by_kv_head:
            queries = heads // kv_heads
            by_kv_head = packed.view(-1, kv_heads, queries + 2, spec.head_dim)
            q, k, v = (each.flatten(1, 2) for each in by_kv_head.split((queries, 1, 1), 2))
        else:
            by_head = packed.view(-1, heads + 2 * kv_heads, spec.head_dim)
            q, k, v = by_head.split((heads, kv_heads, kv_heads), 1)
        q, k = self._turned(q, k, batch)
        if batch.cu_seqlens is None:
            q, k, v = (each.unflatten(0, (batch.size, batch.length)) for each in (q, k, v))
        if batch.cache is not None:
            k, v = batch.cache.extend(self.layer, k, v)
        options: dict[str, Any] = {
            "cu_seqlens": batch.cu_seqlens,
            "max_seqlen": None if batch.cu_seqlens is None else batch.length,
            "window": spec.window,
            "scale": spec.scale,
            "softcap": spec.softcap,
        }
        if spec.has_sinks:
            out = attention_with_sinks(q, k, v, self.sinks, **options)
        else:
            out = attention(q, k, v, **options)
        out = out.reshape(packed.shape[0], heads * spec.head_dim)
        return row_linear(out, self._output.weight, **parallel)

    def _turned(self, q: Tensor, k: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Queries and keys (tokens, heads of this rank, head_dim), normalised where they are."""
        spec, model = self.spec, self.setting.spec
        cos, sin = self.setting.rotary.tables(spec, batch.max_positions, q.device)
        if spec.qk_norm == "head":
            return rope_normed(
                q,
                k,
                self.q_norm.weight,
                self.k_norm.weight,
                cos,
                sin,
                eps=model.norm_eps,
                position_ids=batch.position_ids,
                interleaved=self.setting.interleaved,
                zero_centered=model.norm_adds_one,
            )
        if spec.qk_norm:
            q = self._normed(q, self.q_norm.weight)
            k = self._normed(k, self.k_norm.weight)
        q, keys = rope_apart(q, k[:, None], cos, sin, batch.position_ids, self.setting.interleaved)
        return q, keys[:, 0]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """Queries or keys (tokens, heads of this rank, head_dim), not turned yet."""
        spec, ranks = self.setting.spec, self.setting.ranks
        if self.spec.qk_norm == "apart":
            normed = F.layer_norm(x.float(), x.shape[-1:], eps=spec.norm_eps)
            return (normed * weight.float()).to(x.dtype)
        # Copies of heads count as often as they are there: the mean is the same.
        width = ranks.size * x.shape[1] * self.spec.head_dim
        return rms_norm_over_ranks(x.flatten(1), weight, spec.norm_eps, width, ranks).view(x.shape)
