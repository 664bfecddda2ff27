"""RMSNorm, and decoder layers that add the residual in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.patch.hooks import may_go_past
from nanotron_fast.patch.nanotron.targets import DropInOptions

# A replacement of a norm's forward that takes `residual` and `prenorm` has this attribute.
_TAKES_RESIDUAL = "__nanotron_fast_residual__"


def triton_rms_norm(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`TritonRMSNorm.forward`; dropout, and a residual kept in fp32, are left to the original."""

    def forward(
        self: Any,
        input: Tensor,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        return_dropout_mask: bool = False,
    ) -> Any:
        is_wide = residual_in_fp32 or (residual is not None and residual.dtype != input.dtype)
        if dropout_p or return_dropout_mask or is_wide:
            return original(
                self, input, residual, dropout_p, prenorm, residual_in_fp32, return_dropout_mask
            )
        return _norm(self, input, residual, prenorm)

    setattr(forward, _TAKES_RESIDUAL, True)
    return forward


def llama_rms_norm(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`LlamaRMSNorm.forward`, with a residual besides."""

    def forward(
        self: Any, input: Tensor, residual: Tensor | None = None, prenorm: bool = False
    ) -> Any:
        if self.weight.dtype != input.dtype and residual is None and not prenorm:
            return original(self, input)  # its result has the wider of the two dtypes
        return _norm(self, input, residual, prenorm)

    setattr(forward, _TAKES_RESIDUAL, True)
    return forward


def _norm(self: Any, x: Tensor, residual: Tensor | None, prenorm: bool) -> Any:
    found = rms_norm(x, self.weight, self.eps, residual)
    y, h = found if isinstance(found, tuple) else (found, x)
    return (y, h) if prenorm else y


def _add_and_norm(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x + residual) and the sum. Who watches the norm sees the sum go in, one tensor out."""
    takes = getattr(type(norm).forward, _TAKES_RESIDUAL, False)
    if takes and may_go_past(norm) and norm.weight.dtype == x.dtype == residual.dtype:
        y, h = norm(x, residual=residual, prenorm=True)
        return y, h
    h = x + residual
    return norm(h), h


def llama_layer(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`LlamaDecoderLayer._core_forward`."""

    def core_forward(self: Any, hidden_states: Tensor, sequence_mask: Tensor) -> Any:
        normed = self.input_layernorm(hidden_states)
        out = self.attn(hidden_states=normed, sequence_mask=sequence_mask)
        hidden_states = _second_half(self, out["hidden_states"], hidden_states)
        return hidden_states, out["sequence_mask"]

    return core_forward


def llama_layer_0_4(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`LlamaDecoderLayer.forward` of the released 0.4."""
    core_forward = llama_layer(original, options)

    def forward(self: Any, hidden_states: Tensor, sequence_mask: Tensor) -> dict[str, Any]:
        hidden_states, sequence_mask = core_forward(self, hidden_states, sequence_mask)
        return {"hidden_states": hidden_states, "sequence_mask": sequence_mask}

    return forward


def qwen2_layer(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`Qwen2DecoderLayer._core_forward`."""

    def core_forward(
        self: Any, hidden_states: Tensor, position_ids: Tensor, cu_seqlens: Any
    ) -> Any:
        normed = self.input_layernorm(hidden_states)
        out = self.attn(hidden_states=normed, position_ids=position_ids, cu_seqlens=cu_seqlens)
        hidden_states = _second_half(self, out["hidden_states"], hidden_states)
        return hidden_states, position_ids, cu_seqlens

    return core_forward


def _second_half(self: Any, attended: Tensor, residual: Tensor) -> Tensor:
    """From attention's output on: add, norm, MLP, add."""
    normed, residual = _add_and_norm(self.post_attention_layernorm, attended, residual)
    out: Tensor = self.mlp(hidden_states=normed)["hidden_states"]
    return out + residual
