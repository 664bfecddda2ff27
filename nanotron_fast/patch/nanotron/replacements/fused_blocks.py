"""An MLP, or an attention, as one function from its input to its output.

Nothing between the two products of a block is kept that backward does not need, and communication
runs under the weights' gradients. Nobody sees what lies between, so a block that is watched, or
that is not what Nanotron defines, goes to the single operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.parallel.attention import tensor_parallel_attention
from nanotron_fast.parallel.mlp import tensor_parallel_mlp
from nanotron_fast.patch.hooks import why_not_past
from nanotron_fast.patch.nanotron.fallbacks import fall_back
from nanotron_fast.patch.nanotron.origin import why_not_whole
from nanotron_fast.patch.nanotron.replacements.attention import (
    llama_rotary,
    qwen2_rotary,
    qwen2_turns,
)
from nanotron_fast.patch.nanotron.replacements.masks import document_starts
from nanotron_fast.patch.nanotron.replacements.mlp import activation_of
from nanotron_fast.patch.nanotron.targets import DropInOptions


def _why_not_linears(
    first: Any, last: Any, x: Tensor, names: tuple[str, str], *, may_have_bias: bool
) -> str:
    """Why the two linears of a block cannot be part of one function; empty where they can."""
    kinds = ("TensorParallelColumnLinear", "TensorParallelRowLinear")
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    for linear, name, kind in zip((first, last), names, kinds, strict=True):
        if type(linear).__name__ != kind:
            return f"{name} is a {type(linear).__name__}, not a {kind}"
        if linear.weight.dtype != x.dtype:
            return f"{name} is {linear.weight.dtype} and its input {x.dtype}"
    if last.bias is not None or (first.bias is not None and not may_have_bias):
        return f"{names[0] if last.bias is None else names[1]} has a bias"
    if first.pg is not last.pg or first.mode is not last.mode:
        return f"{names[0]} and {names[1]} are of different groups or modes"
    if not getattr(first, "tp_recompute_allgather", True) and first.pg.size() > 1:
        return "tp_recompute_allgather is off, and the block gathers again in backward"
    return ""


def _group_of(linear: Any) -> dict[str, Any]:
    return {"group": linear.pg, "mode": linear.mode.name.lower()}


def _size(linear: Any) -> int:
    """How many times more tokens a linear gives than it takes."""
    return int(linear.pg.size()) if linear.mode.name == "REDUCE_SCATTER" else 1


# --- MLP


def _mlp(
    self: Any, x: Tensor, act: Any, original: Callable[..., Any], **between: Any
) -> dict[str, Tensor]:
    """x (..., hidden), with sequence parallelism a share of dimension 0."""
    up, down = self.gate_up_proj, self.down_proj
    names = ("gate_up_proj", "down_proj")
    reason = _why_not_linears(up, down, x, names, may_have_bias=False) or why_not_whole(
        gate_up_proj=up, down_proj=down, **between
    )
    activation = activation_of(act)
    if not reason and activation is None:
        reason = f"{type(act).__name__} is not served, or is watched"
    if reason or activation is None:
        fall_back("fused_mlp", original, reason)
        found: dict[str, Tensor] = original(self, hidden_states=x)
        return found
    out = tensor_parallel_mlp(
        x.reshape(-1, x.shape[-1]),
        up.weight,
        down.weight,
        **_group_of(up),
        activation=activation,
        recompute=False,
    )
    return {"hidden_states": out.view(x.shape)}


def llama_mlp(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """Llama's `MLP.forward`: hidden_states (seq, batch, hidden)."""

    def forward(self: Any, hidden_states: Tensor) -> dict[str, Tensor]:
        between = self.split_silu_mul
        return _mlp(self, hidden_states, between.act, original, split_silu_mul=between)

    return forward


def qwen2_mlp(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`Qwen2MLP.forward`: hidden_states (batch * seq, hidden)."""

    def forward(self: Any, hidden_states: Tensor) -> dict[str, Tensor]:
        return _mlp(self, hidden_states, self.act, original)

    return forward


# --- Attention


def llama_attention(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`CausalSelfAttention.forward` in training: hidden_states (seq, batch, hidden).

    Generation, and masks that are not full, are the single operations'.
    """

    def forward(self: Any, hidden_states: Tensor, sequence_mask: Tensor) -> dict[str, Tensor]:
        if self.get_local_store() is not None:
            found: dict[str, Tensor] = original(self, hidden_states, sequence_mask)
            return found
        reason = _why_not_llama(self, hidden_states, sequence_mask, options)
        if reason:
            fall_back("fused_attention", original, reason)
            found = original(self, hidden_states, sequence_mask)
            return found
        qkv, batch = self.qkv_proj, hidden_states.shape[1]
        seq = hidden_states.shape[0] * _size(qkv)
        cos, sin, position_ids = llama_rotary(self, seq, batch, hidden_states.device, options)
        out = tensor_parallel_attention(
            hidden_states.flatten(0, 1),
            qkv.weight,
            self.o_proj.weight,
            cos,
            sin,
            num_q_heads=self.n_local_q_heads * qkv.pg.size(),
            num_kv_heads=self.n_local_kv_heads * qkv.pg.size(),
            head_dim=self.d_qk,
            batch=batch,
            qkv_bias=qkv.bias,
            **_group_of(qkv),
            scale=1 / self.d_qk if getattr(self.attention, "is_using_mup", False) else None,
            interleaved=self.flash_rotary_embedding.interleaved,
            position_ids=position_ids,
            sequence_first=True,
            recompute=False,
        )
        return {"hidden_states": out.view(hidden_states.shape), "sequence_mask": sequence_mask}

    return forward


def _why_not_rotary(rotary: Any) -> str:
    """The single operations go past it too, whatever class it is of."""
    reason = why_not_past(rotary)
    return f"the rotary embedding: {reason}" if reason else ""


def _why_not_llama(self: Any, x: Tensor, mask: Tensor, options: DropInOptions) -> str:
    qkv, last = self.qkv_proj, self.o_proj
    reason = _why_not_linears(qkv, last, x, ("qkv_proj", "o_proj"), may_have_bias=True)
    reason = reason or why_not_whole(qkv_proj=qkv, o_proj=last, attention=self.attention)
    reason = reason or _why_not_rotary(self.flash_rotary_embedding)
    if not reason and self.d_qk != self.d_v:
        reason = f"its values have {self.d_v} elements a head, its keys {self.d_qk}"
    if not reason and mask.shape[1] != x.shape[0] * _size(qkv):
        reason = f"a sequence mask of {mask.shape[1]} for {x.shape[0] * _size(qkv)} tokens"
    if not reason and document_starts(mask, options) is not None:
        reason = "a sequence mask is not full"
    return reason


def qwen2_attention(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`Qwen2Attention.forward`: hidden_states (batch * seq, hidden), position_ids (batch, seq).

    Ring attention and layers without rotary embedding are the single operations'.
    """

    def forward(
        self: Any, hidden_states: Tensor, position_ids: Tensor, cu_seqlens: Any = None
    ) -> dict[str, Tensor]:
        reason = _why_not_qwen2(self, hidden_states, cu_seqlens)
        if reason:
            fall_back("fused_attention", original, reason)
            found: dict[str, Tensor] = original(self, hidden_states, position_ids, cu_seqlens)
            return found
        qkv, seq = self.qkv_proj, position_ids.shape[1] // self.cp_pg_size
        num_tokens = hidden_states.shape[0] * _size(qkv)
        cos, sin, rows = qwen2_rotary(self, seq, num_tokens, hidden_states.device, options)
        out = tensor_parallel_attention(
            hidden_states,
            qkv.weight,
            self.o_proj.weight,
            cos,
            sin,
            num_q_heads=self.local_num_heads * qkv.pg.size(),
            num_kv_heads=self.local_num_kv_heads * qkv.pg.size(),
            head_dim=self.head_dim,
            cu_seqlens=cu_seqlens,
            max_seqlen=seq,
            qkv_bias=qkv.bias,
            **_group_of(qkv),
            window=self.sliding_window_size,
            interleaved=self.rotary_emb.interleaved,
            position_ids=rows,
            recompute=False,
            # What Nanotron logs under that name is flash-attn's log-sum-exp.
            lse_to=_logging(self) if self.log_attn_probs else None,
        )
        return {"hidden_states": out, "position_ids": position_ids.view(-1, seq)}

    return forward


def _logging(self: Any) -> Callable[[Tensor], None]:
    def log(lse: Tensor) -> None:
        self.tbi_logger({"attn_probs": lse})

    return log


def _why_not_qwen2(self: Any, x: Tensor, cu_seqlens: Any) -> str:
    qkv, last = self.qkv_proj, self.o_proj
    reason = _why_not_linears(qkv, last, x, ("qkv_proj", "o_proj"), may_have_bias=True)
    reason = reason or why_not_whole(qkv_proj=qkv, o_proj=last, attention=self.attention)
    reason = reason or _why_not_rotary(self.rotary_emb)
    if not reason and not (self._use_qkv_packed and isinstance(cu_seqlens, Tensor)):
        reason = "its attention is over a ring, or not packed"
    if not reason and not qwen2_turns(self):
        reason = f"layer {self.layer_idx} has no rotary embedding"
    return reason
