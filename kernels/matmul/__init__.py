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
import triton
from torch import Tensor
from torch.nn.functional import linear

from nanotron_fast.kernels.glu import ACTIVATIONS, glu_forward, glu_reference
from nanotron_fast.kernels.matmul.choice import Candidates, choose, tokens_bucket
from nanotron_fast.kernels.matmul.kernels import GROUP, MAX_BLOCK_K, glu_kernel, rope_kernel
from nanotron_fast.kernels.rope import check_arguments, rope_qkv_, rope_qkv_reference
from nanotron_fast.kernels.runtime.backend import on_grid, operator, uses_triton

KINDS = ("glu", "glu_save", "rope")


def matmul_glu_reference(
    x: Tensor, gate_up_weight: Tensor, activation: str = "silu", *, save_gate_up: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in plain torch, at least in fp32; what CPU tensors take."""
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
    """The same in plain torch, at least in fp32; what CPU tensors take."""
    wide = torch.promote_types(x.dtype, torch.float32)
    qkv = linear(x.to(wide), qkv_weight.to(wide), None if bias is None else bias.to(wide))
    sizes = (num_q_heads, num_kv_heads, head_dim)
    parts = rope_qkv_reference(qkv, cos, sin, *sizes, position_ids, interleaved)
    return torch.cat(parts, dim=1).flatten(1).to(x.dtype)


def _grid(num_rows: int, num_pairs: int):
    def size(constants: dict[str, int]) -> tuple[int]:
        row_blocks = triton.cdiv(num_rows, constants["BLOCK_M"])
        return (row_blocks * triton.cdiv(num_pairs, constants["BLOCK_N"] // 2),)

    return size


def _is_wide(weight: Tensor) -> bool:
    """Whether offsets into it need more than 32 bits."""
    return weight.shape[0] * weight.stride(0) >= 2**31


@operator("nanotron_fast::matmul_glu")
def _matmul_glu(
    x: Tensor, gate_up_weight: Tensor, activation: str, save_gate_up: bool
) -> tuple[Tensor, Tensor]:
    """h and gate_up, which is empty where it is not asked for."""
    (num_rows, hidden), num_cols = x.shape, gate_up_weight.shape[0] // 2
    h = x.new_empty(num_rows, num_cols)
    gate_up = x.new_empty((num_rows, 2 * num_cols) if save_gate_up else (0,))
    if h.numel():
        on_grid(glu_kernel, _grid(num_rows, num_cols))(
            x,
            gate_up_weight,
            h,
            gate_up if save_gate_up else None,
            x.stride(0),
            gate_up_weight.stride(0),
            num_rows,
            num_cols,
            hidden,
            tokens_bucket(num_rows),
            ACTIVATION=activation,
            EVEN_K=hidden % MAX_BLOCK_K == 0,
            WIDE=_is_wide(gate_up_weight),
            GROUP=GROUP,
        )
    return h, gate_up


@_matmul_glu.register_fake
def _(x, gate_up_weight, activation, save_gate_up):
    shape = (x.shape[0], gate_up_weight.shape[0])
    return x.new_empty(shape[0], shape[1] // 2), x.new_empty(shape if save_gate_up else (0,))


@operator("nanotron_fast::matmul_rope")
def _matmul_rope(
    x: Tensor,
    qkv_weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """qkv; bias, tables and positions are contiguous."""
    (num_rows, hidden), num_cols = x.shape, qkv_weight.shape[0]
    qkv = x.new_empty(num_rows, num_cols)
    if qkv.numel():
        on_grid(rope_kernel, _grid(num_rows, num_cols // 2))(
            x,
            qkv_weight,
            bias,
            cos,
            sin,
            position_ids,
            qkv,
            x.stride(0),
            qkv_weight.stride(0),
            num_rows,
            num_cols,
            hidden,
            num_q_heads + num_kv_heads,
            cos.shape[0],
            tokens_bucket(num_rows),
            HEAD_DIM=head_dim,
            HALF=cos.shape[1],
            INTERLEAVED=interleaved,
            EVEN_K=hidden % MAX_BLOCK_K == 0,
            WIDE=_is_wide(qkv_weight),
            GROUP=GROUP,
        )
    return qkv


@_matmul_rope.register_fake
def _(
    x, qkv_weight, bias, cos, sin, num_q_heads, num_kv_heads, head_dim, position_ids, interleaved
):
    return x.new_empty(x.shape[0], qkv_weight.shape[0])


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
        save_gate_up: give the product itself too, for a backward that does not compute it again.

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
    if not uses_triton(x) or x.dtype == torch.float64:
        return matmul_glu_reference(x, gate_up_weight, activation, save_gate_up=save_gate_up)
    x, gate_up_weight = _with_aligned_rows(x), _with_aligned_rows(gate_up_weight)
    h, gate_up = _matmul_glu(x, gate_up_weight, activation, save_gate_up)
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
    rest = (cos, sin, num_q_heads, num_kv_heads, head_dim, position_ids)
    check_arguments("matmul_rope", torch.Size((x.shape[0], qkv_weight.shape[0])), *rest)
    if bias is not None and bias.shape != qkv_weight.shape[:1]:
        raise ValueError(
            f"matmul_rope: bias {tuple(bias.shape)} for a weight {tuple(qkv_weight.shape)}"
        )
    is_double = torch.float64 in (x.dtype, cos.dtype)
    if not uses_triton(x) or is_double or head_dim % 2:
        return matmul_rope_reference(x, qkv_weight, bias, *rest, interleaved)
    x, qkv_weight = _with_aligned_rows(x), _with_aligned_rows(qkv_weight)
    bias, cos, sin, position_ids = (
        None if tensor is None else tensor.contiguous() for tensor in (bias, cos, sin, position_ids)
    )
    sizes = (num_q_heads, num_kv_heads, head_dim)
    return _matmul_rope(x, qkv_weight, bias, cos, sin, *sizes, position_ids, interleaved)


def _candidates(
    kind: str, tokens: int, hidden: int, out: int, dtype: torch.dtype, device: torch.device
) -> Candidates:
    """Both ways to compute a product of this shape, on random values."""
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
        sizes = (num_heads - 2 * num_kv_heads, num_kv_heads, head_dim)
        cos, sin = (torch.ones(tokens, head_dim // 2, device=device) for _ in range(2))
        return (
            lambda: rope_qkv_(linear(x, weight), cos, sin, *sizes),
            lambda: matmul_rope(x, weight, None, cos, sin, *sizes),
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

    NANOTRON_FAST_FUSED_MATMUL=auto|always|never forces it; `matmul_choice` says when auto measures.
    Raises ValueError for another kind or mode.
    """
    if kind not in KINDS:
        raise ValueError(f"prefers_fused: {kind!r}: choose {', '.join(KINDS)}")
    key = (kind, tokens_bucket(tokens), hidden, out, dtype, device)
    return choose(key, lambda: _candidates(*key))
