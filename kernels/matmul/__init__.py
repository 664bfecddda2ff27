"""Matrix products that end in what follows them: the GLU after gate/up, the rotary after QKV.

    matmul_glu     h = act(x Wg^T) * (x Wu^T)                    with the rows of W as [Wg | Wu]
    matmul_rope    qkv = turn(x W^T + bias), q and k turned as `rope_qkv` does

The product is summed in fp32 and rounded once, after the epilogue. The vendor's product followed by
our kernel rounds twice, to gate_up or qkv in between, so the two differ in the last place. A
backward that is given gate_up sees its rounded copy either way.

FLOPs: 2 * tokens * rows of W * hidden. What the epilogue saves is memory traffic: for two-byte
elements 8 bytes for each pair of gate and up (4 where gate_up is kept), 4 for each element of q and
k. Against that stands how well the vendor tunes its product: `prefers_fused` measures. These
operations have no gradient of their own: the blocks that use them bring it.
Shapes: x (tokens, hidden); gate_up_weight (2 * inter, hidden), h (tokens, inter), gate_up (tokens,
2 * inter); qkv_weight ((H + 2K) * d, hidden), bias ((H + 2K) * d,), qkv (tokens, (H + 2K) * d).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from nanotron_fast.kernels.glu import ACTIVATIONS, glu_forward
from nanotron_fast.kernels.matmul.choice import Candidates, Key, choose, tokens_bucket
from nanotron_fast.kernels.matmul.operators import glu_product, rope_product
from nanotron_fast.kernels.matmul.reference import matmul_glu_reference, matmul_rope_reference
from nanotron_fast.kernels.rope import check_arguments, rope_qkv_
from nanotron_fast.kernels.runtime.backend import multiplies

__all__ = [
    "KINDS",
    "matmul_glu",
    "matmul_glu_reference",
    "matmul_rope",
    "matmul_rope_reference",
    "prefers_fused",
]

KINDS = ("glu", "glu_save", "rope")


def _check_product(name: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{name}: x {tuple(x.shape)} for a weight {tuple(weight.shape)}")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"{name}: x {x.dtype} for a weight {weight.dtype}")


def _with_aligned_rows(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows a multiple of 16 elements apart, if its width allows it."""
    is_aligned = matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0
    return matrix if is_aligned else matrix.contiguous()


def matmul_glu(
    x: Tensor, gate_up_weight: Tensor, activation: str = "silu", *, save_gate_up: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """An MLP's first product and its gated activation in one kernel; no gradient.

    Args:
        x: (tokens, hidden), bf16, fp16 or fp32.
        gate_up_weight: (2 * inter, hidden) as [gate | up], x's dtype.
        activation: "silu", "gelu" (with erf) or "gelu_tanh".
        save_gate_up: return the product itself too, for a backward that does not compute it again.

    Returns:
        h (tokens, inter) in x's dtype, or (h, gate_up).

    Raises:
        ValueError: shapes or dtypes do not fit, or the activation is unknown.
    """
    _check_product("matmul_glu", x, gate_up_weight)
    if gate_up_weight.shape[0] % 2:
        raise ValueError(f"matmul_glu: {gate_up_weight.shape[0]} rows have no two equal halves")
    if activation not in ACTIVATIONS:
        raise ValueError(f"matmul_glu: activation {activation!r}: choose {', '.join(ACTIVATIONS)}")
    if not multiplies(x) or x.dtype == torch.float64:
        return matmul_glu_reference(x, gate_up_weight, activation, save_gate_up=save_gate_up)
    x, gate_up_weight = _with_aligned_rows(x), _with_aligned_rows(gate_up_weight)
    h, gate_up = glu_product(x, gate_up_weight, activation, save_gate_up)
    return (h, gate_up) if save_gate_up else h


def matmul_rope(
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
    """The QKV product and the rotary embedding of q and k in one kernel; no gradient.

    Args:
        x: (tokens, hidden), bf16, fp16 or fp32.
        qkv_weight: ((H + 2K) * d, hidden) as [q | k | v], x's dtype; d is even.
        bias: ((H + 2K) * d,) or None.
        cos, sin, num_q_heads, num_kv_heads, head_dim, position_ids, interleaved: as in `rope_qkv`.

    Returns:
        qkv (tokens, (H + 2K) * d) in x's dtype, q and k turned.

    Raises:
        ValueError: shapes or dtypes do not fit, or a position is outside the tables.
    """
    _check_product("matmul_rope", x, qkv_weight)
    heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    shape = torch.Size((x.shape[0], qkv_weight.shape[0]))
    check_arguments("matmul_rope", shape, cos, sin, position_ids=position_ids, **heads)
    if bias is not None and bias.shape != qkv_weight.shape[:1]:
        raise ValueError(
            f"matmul_rope: bias {tuple(bias.shape)} for a weight {tuple(qkv_weight.shape)}"
        )
    is_double = torch.float64 in (x.dtype, cos.dtype)
    if not multiplies(x) or is_double or head_dim % 2:
        return matmul_rope_reference(
            x,
            qkv_weight,
            bias,
            cos,
            sin,
            **heads,
            position_ids=position_ids,
            interleaved=interleaved,
        )
    x, qkv_weight = _with_aligned_rows(x), _with_aligned_rows(qkv_weight)
    bias, cos, sin, position_ids = (
        None if tensor is None else tensor.contiguous() for tensor in (bias, cos, sin, position_ids)
    )
    return rope_product(
        x,
        qkv_weight,
        bias,
        cos,
        sin,
        **heads,
        position_ids=position_ids,
        interleaved=interleaved,
    )


def _candidates(key: Key) -> Candidates:
    """Both ways to compute a product of this shape, on random values."""
    kind, tokens, hidden, out, dtype, device = key
    # A generator of its own: a measurement must not move the dropout of a training run.
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.empty(rows, hidden, dtype=dtype, device=device).uniform_(-1, 1, generator=generator)
        for rows in (tokens, out)
    )
    if kind == "rope":
        head_dim = next((size for size in (128, 64, 32) if out % size == 0 and out > 2 * size), 2)
        num_heads = out // head_dim
        num_kv_heads = max(1, num_heads // 6)
        heads = {
            "num_q_heads": num_heads - 2 * num_kv_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        cos, sin = (torch.ones(tokens, head_dim // 2, device=device) for _ in range(2))
        return (
            lambda: rope_qkv_(linear(x, weight), cos, sin, **heads),
            lambda: matmul_rope(x, weight, None, cos, sin, **heads),
        )
    saves = kind == "glu_save"
    return (
        lambda: glu_forward(linear(x, weight)),
        lambda: matmul_glu(x, weight, save_gate_up=saves),
    )


def prefers_fused(
    kind: str, tokens: int, hidden: int, out: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the fused kernel is the faster one here, measured at the first use of a shape.

    Args:
        kind: "glu", "glu_save" (gate_up is kept) or "rope".
        tokens, hidden: of x; numbers of tokens up to the next power of two share a decision.
        out: rows of the weight.
        dtype, device: of x and the weight.

    NANOTRON_FAST_FUSED_MATMUL=auto|always|never forces it; `choice` says when auto measures.
    Raises ValueError for another kind or mode.
    """
    if kind not in KINDS:
        raise ValueError(f"prefers_fused: {kind!r}: choose {', '.join(KINDS)}")
    key = Key(kind, tokens_bucket(tokens), hidden, out, dtype, device)
    return choose(key, lambda: _candidates(key))
