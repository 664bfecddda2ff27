"""Self-attention from the packed projection on: rotary in one pass, and documents looked at once.

Llama's activations are (seq, batch, hidden), Qwen2's (batch * seq, hidden). Nothing is copied on
the way: queries, keys and values are views into what the rotary kernel wrote, and attention takes
them with their strides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.rope import rope_qkv
from nanotron_fast.kernels.rope.tables import rope_frequencies, rope_tables
from nanotron_fast.kernels.runtime import capture
from nanotron_fast.patch.hooks import may_go_past
from nanotron_fast.patch.nanotron.attention_with_lse import attention_with_lse
from nanotron_fast.patch.nanotron.replacements.masks import document_starts
from nanotron_fast.patch.nanotron.targets import ON_DISABLE, DropInOptions

# An attention of Llama's holds by this name `rope_scaling` and `max_position_embeddings` of its
# configuration.
_SCALING = "_nanotron_fast_rope_scaling"
# A replacement of a core attention that takes (batch, seq, heads, d) too has this attribute.
_TAKES_BATCH = "__nanotron_fast_batch__"


# --- Rotary tables


@lru_cache(maxsize=16)
def _tables(
    head_dim: int,
    num_positions: int,
    theta: float,
    scaling: str,
    max_position_embeddings: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The tables that all layers share. `scaling` is JSON, so that it can be a key."""
    capture.refuse_if_capturing(device, "an attention whose rotary tables are new")
    with torch.inference_mode(False):  # autograd may save them, whoever asks first
        return rope_tables(
            head_dim,
            num_positions,
            theta,
            json.loads(scaling),
            max_position_embeddings=max_position_embeddings,
            device=device,
        )


@lru_cache(maxsize=16)
def _positions(seq: int, batch: int, first: int, device: torch.device, by_batch: bool) -> Tensor:
    """(seq * batch,): each token's place in its row, whose tokens are neighbours if `by_batch`."""
    capture.refuse_if_capturing(device, "an attention whose positions are new")
    with torch.inference_mode(False):
        row = torch.arange(first, first + seq, device=device)
        return row.repeat(batch) if by_batch else row.repeat_interleave(batch)


ON_DISABLE += [_tables.cache_clear, _positions.cache_clear]


def mark_rope_scaling(model: nn.Module) -> None:
    """Tells the Llama attentions of a model that exists already what its configuration says."""
    config = getattr(getattr(model, "module", model), "config", None)
    for module in model.modules():
        if type(module).__name__ == "CausalSelfAttention" and hasattr(config, "rope_scaling"):
            _mark(module, config)


def _mark(module: nn.Module, config: Any) -> None:
    vars(module)[_SCALING] = (
        getattr(config, "rope_scaling", None),
        getattr(config, "max_position_embeddings", None),
    )


def llama_init(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`CausalSelfAttention.__init__`: keeps what the configuration says of rope scaling."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        _mark(self, config)

    return __init__


def _llama_scaling(
    self: Any, options: DropInOptions
) -> tuple[Mapping[str, Any] | None, int | None]:
    if not options.rope_scaling:
        return None, None
    if _SCALING not in vars(self):
        raise RuntimeError(
            "rope_scaling=True, and this attention was made before: enable the drop-in before the "
            "model is built, or pass it as enable(model=...)"
        )
    found: tuple[Mapping[str, Any] | None, int | None] = vars(self)[_SCALING]
    return found


# --- Llama


def llama_forward(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`CausalSelfAttention.forward` in training; generation is the original's.

    hidden_states (seq, batch, hidden), sequence_mask (batch, seq).
    """

    def forward(self: Any, hidden_states: Tensor, sequence_mask: Tensor) -> dict[str, Tensor]:
        scaling, max_positions = _llama_scaling(self, options)
        if self.get_local_store() is not None:
            _scale_generation(self, scaling, max_positions)
            return original(self, hidden_states, sequence_mask)
        if not may_go_past(self.flash_rotary_embedding):
            _refuse_scaling(scaling)
            return original(self, hidden_states, sequence_mask)
        qkv = self.qkv_proj(hidden_states)
        seq, batch, _ = qkv.shape
        cos, sin, position_ids = llama_rotary(self, seq, batch, qkv.device, options)
        interleaved = self.flash_rotary_embedding.interleaved
        sizes = (self.n_local_q_heads, self.n_local_kv_heads, self.d_qk)
        turned = rope_qkv(qkv.flatten(0, 1), cos, sin, *sizes, position_ids, interleaved)
        q, k, v = (x.unflatten(0, (seq, batch)).transpose(0, 1) for x in turned)
        takes_batch = getattr(type(self.attention).forward, _TAKES_BATCH, False)
        if not (takes_batch and may_go_past(self.attention)):
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out = self.attention(
            query_states=q,
            key_states=k,
            value_states=v,
            q_sequence_mask=sequence_mask,
            kv_sequence_mask=sequence_mask,
        )
        out = out.reshape(batch, seq, self.n_local_q_heads * self.d_v).transpose(0, 1)
        return {"hidden_states": self.o_proj(out), "sequence_mask": sequence_mask}

    return forward


def llama_rotary(
    self: Any, seq: int, batch: int, device: torch.device, options: DropInOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos and sin (seq, d / 2), and each token's row in them: (seq * batch,), or None for 0, 1, ...

    Raises RuntimeError where `rope_scaling` is to be honoured and this attention does not know it.
    """
    scaling, max_positions = _llama_scaling(self, options)
    theta = float(self.flash_rotary_embedding.base)
    tables = _tables(self.d_qk, seq, theta, json.dumps(scaling), max_positions, device)
    cos, sin = capture.keep(tables, device)
    if batch == 1:
        return cos, sin, None
    return cos, sin, capture.keep(_positions(seq, batch, 0, device, False), device)


def _refuse_scaling(scaling: Mapping[str, Any] | None) -> None:
    """Raises where the original has to turn: Nanotron's own embedding knows no scaling."""
    if scaling:
        raise NotImplementedError(
            f"rope_scaling {dict(scaling)}: this attention's rotary embedding has hooks or a "
            "forward of its own, so Nanotron turns by itself, and has no place for the scaling"
        )


def _scale_generation(
    self: Any, scaling: Mapping[str, Any] | None, max_positions: int | None
) -> None:
    """Gives the frequencies to the embedding that the original generates with."""
    if scaling is None:
        return
    rotary = self.rotary_embedding
    frequencies, factor = rope_frequencies(
        self.d_qk, float(rotary.theta), scaling, max_position_embeddings=max_positions
    )
    if factor != 1 or not hasattr(rotary, "inv_freq"):
        raise NotImplementedError(
            f"rope_scaling {dict(scaling)}: Nanotron's generation has no place for it"
        )
    rotary.inv_freq.copy_(frequencies)


def core_attention(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """Llama's `CoreAttention.forward`.

    Queries (batch * seq, H, d) or (batch, seq, H, d), keys and values likewise, and masks (batch,
    seq), which may be broadcast along batch. Returns the shape of the queries.
    """

    def forward(
        self: Any,
        query_states: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        q_sequence_mask: Tensor,
        kv_sequence_mask: Tensor,
    ) -> Tensor:
        if q_sequence_mask is not kv_sequence_mask or not q_sequence_mask.shape[1]:
            flat = (x.reshape(-1, *x.shape[-2:]) for x in (query_states, key_states, value_states))
            out = original(self, *flat, q_sequence_mask, kv_sequence_mask)
            return out.reshape(query_states.shape)
        batch, seq = q_sequence_mask.shape
        starts = document_starts(q_sequence_mask, options)
        shape = (batch, seq) if starts is None else (batch * seq,)
        q, k, v = (
            x if x.shape[:-2] == shape else x.reshape(*shape, *x.shape[-2:])
            for x in (query_states, key_states, value_states)
        )
        out = attention(
            q,
            k,
            v,
            causal=seq > 1,
            cu_seqlens=starts,
            max_seqlen=None if starts is None else seq,
            scale=1 / q.shape[-1] if getattr(self, "is_using_mup", False) else None,
        )
        return out.reshape(query_states.shape)

    setattr(forward, _TAKES_BATCH, True)
    return forward


# --- Qwen2


def qwen2_forward(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`Qwen2Attention._forward_packed`; ring attention is the original's.

    qkv (batch * seq, (H + 2K) * d), position_ids (batch * seq,), cu_seqlens (documents + 1,) int32.
    Positions count from the start of a row, as Nanotron's do, also where documents start within it.
    """

    def forward_packed(
        self: Any, qkv: Tensor, seq_length: int, position_ids: Tensor, cu_seqlens: Any
    ) -> Tensor:
        config = self.config
        is_watched = not may_go_past(self.rotary_emb)
        if is_watched and options.rope_scaling:
            _refuse_scaling(getattr(config, "rope_scaling", None))
        if is_watched or not isinstance(cu_seqlens, Tensor):
            return original(self, qkv, seq_length, position_ids, cu_seqlens)
        heads, kv_heads, head_dim = self.local_num_heads, self.local_num_kv_heads, self.head_dim
        if qwen2_turns(self):
            cos, sin, positions = qwen2_rotary(self, seq_length, len(qkv), qkv.device, options)
            interleaved = self.rotary_emb.interleaved
            q, k, v = rope_qkv(qkv, cos, sin, heads, kv_heads, head_dim, positions, interleaved)
        else:
            self.sliding_window_size = None  # as Nanotron does where there is no rotary
            q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
        attending: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "max_seqlen": seq_length,
            "window": self.sliding_window_size,
        }
        if self.log_attn_probs:  # what Nanotron logs under that name is flash-attn's log-sum-exp
            out, lse = attention_with_lse(q, k, v, **attending)
            self.tbi_logger({"attn_probs": lse})
        else:
            out = attention(q, k, v, **attending)
        return out.reshape(-1, heads * head_dim)

    return forward_packed


def qwen2_turns(self: Any) -> bool:
    """Whether the layer of this attention has a rotary embedding."""
    every = self.config.no_rope_layer
    return every is None or bool((self.layer_idx + 1) % every)


def qwen2_rotary(
    self: Any, seq: int, num_tokens: int, device: torch.device, options: DropInOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin (positions, d / 2), and each token's row in them: (num_tokens,)."""
    config, rotary = self.config, self.rotary_emb
    scaling = getattr(config, "rope_scaling", None) if options.rope_scaling else None
    factor = getattr(rotary, "seq_len_interpolation_factor", None)
    if scaling is None and factor is not None:
        scaling = {"rope_type": "linear", "factor": float(factor)}
    first = self.cp_pg.rank() * seq
    tables = _tables(
        self.head_dim,
        seq * self.cp_pg_size,
        float(rotary.base),
        json.dumps(scaling),
        config.max_position_embeddings,
        device,
    )
    cos, sin = capture.keep(tables, device)
    return cos, sin, capture.keep(_positions(seq, num_tokens // seq, first, device, True), device)
