"""Both products in plain torch, at least in fp32; what CPU tensors take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from nanotron_fast.kernels.glu import glu_reference
from nanotron_fast.kernels.rope import rope_qkv_reference


def matmul_glu_reference(
    x: Tensor, gate_up_weight: Tensor, activation: str = "silu", *, save_gate_up: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`matmul_glu`, with its arguments."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate_up = linear(x.to(wide), gate_up_weight.to(wide))
    h = glu_reference(gate_up, activation).to(x.dtype)
    return (h, gate_up.to(x.dtype)) if save_gate_up else h


def matmul_rope_reference(
    x: Tensor,
    qkv_weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """`matmul_rope`, with its arguments."""
    wide = torch.promote_types(x.dtype, torch.float32)
    qkv = linear(x.to(wide), qkv_weight.to(wide), None if bias is None else bias.to(wide))
    parts = rope_qkv_reference(
        qkv,
        cos,
        sin,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        position_ids=position_ids,
        interleaved=interleaved,
    )
    return torch.cat(parts, dim=1).flatten(1).to(x.dtype)
