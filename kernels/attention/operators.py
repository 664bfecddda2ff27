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
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nanotron_fast.kernels.attention.configs import INTERPRETED, measured
from nanotron_fast.kernels.attention.kernels.dkv import dkv_kernel
from nanotron_fast.kernels.attention.kernels.dq import dq_kernel
from nanotron_fast.kernels.attention.kernels.forward import forward_kernel
from nanotron_fast.kernels.runtime.backend import is_interpreting
from nanotron_fast.kernels.runtime.launch import Prepared, on_grid
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.rows import empty_rows
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2
from nanotron_fast.kernels.runtime.tuning import when_forgetting

_LOG2_E = math.log2(math.e)
# Launches by shapes, strides and options, with the blocks that their kind was tuned to: Triton's
# own look into its table takes as long as a launch.
_prepared: dict[tuple[Any, ...], Prepared] = {}
when_forgetting(_prepared.clear)
_MOST_PREPARED = 4096


class Options(NamedTuple):
    """Those of attention(), with their defaults put in; a window that hides nothing is None."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None


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
    copied: tuple[Tensor, ...],
    cu_seqlens: Tensor | None,
    options: Options,
) -> None:
    """One program for each block of rows of each head, of queries or (dkv) of keys.

    Args:
        tensors: the first arguments of the kernel.
        strided: those of `tensors`, q and k first, whose strides the kernel is given.
        copied: what the bulk copy engine reads where it can; nothing, where it cannot.
    """
    q, k = strided[:2]
    key = (
        kernel,
        q.device,
        q.shape,
        k.shape,
        None if cu_seqlens is None else cu_seqlens.shape,
        *[tensor.dtype for tensor in strided],
        *[tensor.stride() for tensor in strided],
        *[tensor.storage_offset() % 16 for tensor in copied],
        *options,
    )
    prepared = _prepared.get(key)
    if prepared is not None:
        if prepared.constants["CAN_TMA"]:
            triton.set_allocator(_scratch)
        prepared.launch(kernel.fn, *tensors, cu_seqlens)
        return
    num_documents = None if cu_seqlens is None else len(cu_seqlens) - 1
    grid = partial(_grid, q.shape, k.shape, num_documents, kernel is dkv_kernel)
    if 0 in grid(INTERPRETED.kwargs):
        return
    numbers = _numbers(strided, num_documents, options, kernel is not forward_kernel)
    constants = _constants(q, copied, num_documents, options)
    blocks = _tuned(kernel, grid, (*tensors, cu_seqlens, *numbers), constants)
    if blocks is not None:
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        _prepared[key] = Prepared(grid(blocks), numbers, **constants, **blocks)


def _tuned(
    kernel: Any,
    grid: Callable[[dict[str, Any]], tuple[int, int, int]],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> dict[str, Any] | None:
    """Launches, and gives the blocks; None where launches are compiled alone."""
    q, size_class = arguments[0], arguments[-1]
    known = measured(kernel.fn.fn.__name__, constants, size_class, q.element_size())
    if is_interpreting():  # nothing to tune, and no clock to tune by
        known = known or INTERPRETED
    if constants["CAN_TMA"]:
        triton.set_allocator(_scratch)
    if known is not None:
        blocks = known.all_kwargs()
        on_grid(kernel.fn, grid)(*arguments, **constants, **blocks)
        return blocks
    on_grid(kernel, grid)(*arguments, **constants)
    best = getattr(kernel, "best_config", None)
    return None if best is None else best.all_kwargs()


def _grid(
    q_shape: torch.Size,
    k_shape: torch.Size,
    num_documents: int | None,
    walks_keys: bool,
    blocks: dict[str, Any],
) -> tuple[int, int, int]:
    rows, heads, _ = (k_shape if walks_keys else q_shape)[-3:]
    block = blocks["BLOCK_N" if walks_keys else "BLOCK_M"]
    if num_documents is None:
        return ceil_div(rows, block), heads, q_shape[0]
    # As find_block() hands the programs out.
    return rows // block + num_documents + 1 if rows else 0, heads, 1


def _numbers(
    strided: tuple[Tensor, ...], num_documents: int | None, options: Options, is_backward: bool
) -> tuple[Any, ...]:
    """A kernel's arguments after its tensors: strides, sizes, scales and size_class."""
    (seq_q, num_heads, _), (seq_k, num_kv_heads, _) = (t.shape[-3:] for t in strided[:2])
    scale = options.scale
    longest = max(seq_q, seq_k)
    sizes = (seq_q, seq_k, num_documents or 0, num_heads // num_kv_heads, options.window or 0)
    scales = (*_units(scale, options.softcap), *((float(scale),) if is_backward else ()))
    size_class = (longest > 1024) + (longest > 4096)
    return tuple(map(_strides, strided)), sizes, scales, size_class


def _constants(
    q: Tensor, copied: tuple[Tensor, ...], num_documents: int | None, options: Options
) -> dict[str, Any]:
    return {
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": _block_d(q),
        "CAUSAL": options.causal,
        "HAS_WINDOW": options.window is not None,
        "HAS_SOFTCAP": options.softcap is not None,
        "VARLEN": num_documents is not None,
        "CAN_TMA": bool(copied) and _can_tma(*copied),
    }


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
    out, lse = empty_rows(q), q.new_empty(lse_shape(q), dtype=torch.float32)
    read, options = (q, k, v), Options(causal, window, scale, softcap)
    _launch(forward_kernel, (*read, out, lse), read, read, cu_seqlens, options)
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
    dq, dk, dv = empty_rows(q), empty_rows(k), empty_rows(v)
    shape = (*lse.shape[:-1], lse.shape[-1] + 1)
    log2_lse, delta = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    options = Options(causal, window, scale, softcap)
    _launch(
        dq_kernel,
        (q, k, v, out, dout, lse, log2_lse, delta, dq),
        (q, k, v, out, dout),
        (q, k, v),
        cu_seqlens,
        options,
    )
    _launch(
        dkv_kernel,
        (q, k, v, dout, log2_lse, delta, dk, dv),
        (q, k, v, dout),
        # It reads whole rows of heads: no padding between one and the next.
        (q, dout) if _block_d(q) == q.shape[-1] else (),
        cu_seqlens,
        options,
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
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """out and lse."""
    return _forward(_dense_heads(q), _dense_heads(k), _dense_heads(v), cu_seqlens, *options)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    tensors = [_dense_heads(tensor) for tensor in (dout, q, k, v, out)]
    return _backward(*tensors, lse.contiguous(), cu_seqlens, *options)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, options):
        q, k, v = _dense_heads(q), _dense_heads(k), _dense_heads(v)
        out, lse = _forward(q, k, v, cu_seqlens, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        grads = _backward(_dense_heads(dout), q, k, v, out, lse, cu_seqlens, *ctx.options)
        return *grads, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: Options) -> Tensor:
    """out alone, for autograd."""
    return _Attention.apply(q, k, v, cu_seqlens, options)
