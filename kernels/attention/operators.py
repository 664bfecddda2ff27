"""Launches of our own attention kernels, as torch operators and for autograd.

Saved for backward: q, k, v, out and lse (4 bytes for each row of a head), nothing of the size of
the scores. q, k, v may be views into one packed tensor: any strides, but 1 within a head.
A head_dim that is no power of two is padded with zeros on the chip, which wastes a part of the
products (a quarter at 96 and 192, three eighths at 80).
Shapes: q, out (batch, seq_q, H, d); k, v (batch, seq_k, K, d); lse (batch, H, seq_q). With
cu_seqlens (documents + 1,) q, k, v, out (tokens, heads, d); lse (H, tokens).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from nanotron_fast.kernels.attention.configs import INTERPRETED
from nanotron_fast.kernels.attention.kernels.dkv import dkv_kernel
from nanotron_fast.kernels.attention.kernels.dq import dq_kernel
from nanotron_fast.kernels.attention.kernels.forward import forward_kernel
from nanotron_fast.kernels.runtime.backend import is_interpreting
from nanotron_fast.kernels.runtime.launch import on_grid
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2

_LOG2_E = math.log2(math.e)
# What a kind of launch was tuned to: Triton's own look into its table takes as long as a launch.
_blocks: dict[tuple[Any, ...], dict[str, Any]] = {}


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """The strides of batch, row and head, in elements."""
    strides = tensor.stride()[:-1]
    return strides if len(strides) == 3 else (0, *strides)


def _can_tma(*tensors: Tensor) -> bool:
    """Whether the bulk copy engine can read them: it wants steps of 16 bytes, and not of 0.

    On the CPU, where launches are compiled but not run, all that a GPU could do.
    """
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    for tensor in tensors:
        batch, row, head = _strides(tensor)
        # All of them are multiples of 16 bytes where what they have in common is.
        steps = batch | row | head | tensor.storage_offset()
        if steps * tensor.element_size() % 16:
            return False
        # Coordinates within a row of heads are 32-bit numbers.
        if row <= 0 or head <= 0 or head * tensor.shape[-2] >= 2**31:
            return False
    return True


def _block_d(tensor: Tensor) -> int:
    """head_dim as the matrix units take it: a power of two, 16 at least."""
    return max(next_power_of_2(tensor.shape[-1]), 16)


def _units(scale: float, softcap: float | None) -> tuple[float, float]:
    """The kernels' `scale` and `cap`."""
    if softcap is None:
        return scale * _LOG2_E, 0.0
    return 2 * _LOG2_E * scale / softcap, softcap * _LOG2_E


def _scratch(num_bytes: int, alignment: int, stream: int | None) -> Tensor:
    """Where the kernels lay descriptors for the bulk copy engine; torch's pool aligns to 512."""
    return torch.empty(num_bytes, dtype=torch.int8, device="cuda")


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    strided: tuple[Tensor, ...],
    *,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    can_tma: bool,
    out_scale: float | None = None,
) -> None:
    """One program for each block of rows of each head, of queries or (dkv) of keys.

    Args:
        tensors: the first arguments of the kernel.
        strided: those of `tensors`, q and k first, whose strides the kernel is given.
        can_tma: whether the bulk copy engine can read them.
        out_scale: what the backward kernels multiply their gradient by; forward takes none.
    """
    q, k = strided[:2]
    num_heads, head_dim = q.shape[-2:]
    num_kv_heads = k.shape[-2]
    batch, num_documents = (q.shape[0], 0) if cu_seqlens is None else (1, len(cu_seqlens) - 1)
    seq_q, seq_k = q.shape[-3], k.shape[-3]
    walks_keys = kernel is dkv_kernel
    rows, heads = (seq_k, num_kv_heads) if walks_keys else (seq_q, num_heads)
    if batch * heads * rows == 0:
        return

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        block = meta["BLOCK_N" if walks_keys else "BLOCK_M"]
        # With documents, as find_block() hands the programs out.
        is_dense = cu_seqlens is None
        blocks = ceil_div(rows, block) if is_dense else rows // block + num_documents + 1
        return blocks, heads, batch

    arguments = (
        *tensors,
        cu_seqlens,
        *[stride for tensor in strided for stride in _strides(tensor)],
        seq_q,
        seq_k,
        num_documents,
        num_heads // num_kv_heads,
        window or 0,
        *_units(scale, softcap),
        *(() if out_scale is None else (float(out_scale),)),
        (max(seq_q, seq_k) > 1024) + (max(seq_q, seq_k) > 4096),
    )
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": _block_d(q),
        "CAUSAL": causal,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "VARLEN": cu_seqlens is not None,
        "CAN_TMA": can_tma,
    }
    dtypes = [tensor.dtype for tensor in tensors]
    key = (kernel, q.device, arguments[-1], *dtypes, *constants.values())
    blocks = _blocks.get(key)
    if blocks is None and is_interpreting():  # nothing to tune, and no clock to tune by
        on_grid(kernel.fn, grid)(*arguments, **constants, **INTERPRETED.all_kwargs())
    else:
        if can_tma:
            triton.set_allocator(_scratch)
        if blocks is None:
            on_grid(kernel, grid)(*arguments, **constants)
            tuned = getattr(kernel, "best_config", None)
            if tuned is not None:  # none where launches are compiled alone
                _blocks[key] = tuned.all_kwargs()
        else:
            on_grid(kernel.fn, grid(blocks))(*arguments, **constants, **blocks)


@operator("nanotron_fast::attention_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out in q's shape and dtype, contiguous, and lse in fp32."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(lse_shape(q), dtype=torch.float32, device=q.device)
    _launch(
        forward_kernel,
        (q, k, v, out, lse),
        (q, k, v),
        cu_seqlens=cu_seqlens,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        can_tma=_can_tma(q, k, v),
    )
    return out, lse


@_forward.register_fake
def _(q, k, v, cu_seqlens, causal, window, scale, softcap):
    return q.new_empty(q.shape), q.new_empty(lse_shape(q), dtype=torch.float32)


@operator("nanotron_fast::attention_backward")
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v, contiguous."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    shape = (*lse.shape[:-1], lse.shape[-1] + 1)
    log2_lse, delta = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    is_power_of_two = _block_d(q) == q.shape[-1]
    options = {
        "cu_seqlens": cu_seqlens,
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "out_scale": scale,
    }
    _launch(
        dq_kernel,
        (q, k, v, out, dout, lse, log2_lse, delta, dq),
        (q, k, v, out, dout),
        **options,
        can_tma=_can_tma(q, k, v),
    )
    _launch(
        dkv_kernel,
        (q, k, v, dout, log2_lse, delta, dk, dv),
        (q, k, v, dout),
        **options,
        # It reads whole rows of heads: no padding between one and the next.
        can_tma=_can_tma(q, dout) and is_power_of_two,
    )
    return dq, dk, dv


@_backward.register_fake
def _(dout, q, k, v, out, lse, cu_seqlens, causal, window, scale, softcap):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def lse_shape(q: Tensor) -> tuple[int, ...]:
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def _dense_heads(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out and lse, with options as attention() has resolved them."""
    return _forward(
        *(_dense_heads(t) for t in (q, k, v)),
        cu_seqlens=cu_seqlens,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
    )


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, with the options of forward()."""
    return _backward(
        *(_dense_heads(t) for t in (dout, q, k, v, out)),
        lse.contiguous(),
        cu_seqlens=cu_seqlens,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, causal, window, scale, softcap):
        options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap}
        q, k, v = _dense_heads(q), _dense_heads(k), _dense_heads(v)
        out, lse = _forward(q, k, v, cu_seqlens, causal, window, scale, softcap)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        grads = _backward(
            _dense_heads(dout), q, k, v, out, lse, cu_seqlens=cu_seqlens, **ctx.options
        )
        return *grads, None, None, None, None, None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """out alone, for autograd, with the options of forward()."""
    return _Attention.apply(q, k, v, cu_seqlens, causal, window, scale, softcap)
