"""Attention: softmax(scale * q k^T) v over the keys that each query sees.

    s = scale * q k^T          s = softcap * tanh(s / softcap) where a softcap is given
    lse = log(sum over visible keys of e^s)      out = e^(s - lse) v

Causal: the last query stands at the last key, and sees those before. A window of W: a query sees
its last W keys, itself included. Documents (cu_seqlens) do not see each other. A row that sees no
key has out = 0 and lse = -inf.

FLOPs for each visible pair of a query and a key of a head: 4 * d forward, 10 * d backward. Ours are
14 * d backward: it computes the scores and dout v^T a second time instead of adding atomically, so
that its sums are always the same. Bytes: q, k, v and out once, if the cache held everything; from
some hundreds of rows on that takes far less time than the FLOPs. Saved for backward: q, k, v, out,
and lse (4 bytes for each row of a head).

The table in `choice` says which implementation runs, a library's or ours.
Shapes: q, out (batch, seq_q, H, d); k, v (batch, seq_k, K, d), K a divisor of H; lse
(batch, H, seq_q) fp32. With cu_seqlens (documents + 1,) int32: q, k, v, out (tokens, heads, d); lse
(H, tokens).
"""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanotron_fast.kernels.attention import cpu, library, operators
from nanotron_fast.kernels.attention.choice import (
    EQUAL,
    FEWER_QUERIES,
    MORE_QUERIES,
    Request,
    choose_backend,
)
from nanotron_fast.kernels.attention.reference import (
    attention_backward_reference,
    attention_forward_reference,
    attention_reference,
)
from nanotron_fast.kernels.runtime.backend import (
    constant_in_a_graph,
    is_interpreting,
    requested_backend,
)
from nanotron_fast.kernels.runtime.tuning import remembered, when_forgetting

__all__ = [
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_reference",
    "explain",
]


# torch.compile keeps what it reads while it traces: the choice is made once per compiled graph.
@constant_in_a_graph
def _choose(
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    causal: bool,
    has_documents: bool,
    has_window: bool,
    has_softcap: bool,
    lengths: str,
    is_training: bool,
    wants_lse: bool,
    backend: str,
) -> tuple[str, str]:
    architecture = 0
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        architecture = 10 * major + minor
    return _decided(
        device.type,
        architecture,
        dtype,
        head_dim,
        causal,
        has_documents,
        has_window,
        has_softcap,
        lengths,
        is_training,
        torch.are_deterministic_algorithms_enabled(),
        wants_lse,
        backend,
        requested_backend(),
        is_interpreting(),
    )


@remembered
def _decided(*request: Any) -> tuple[str, str]:
    """The choice for the fields of a Request, in their order; what is installed does not change."""
    return choose_backend(Request(*request), library.missing)


def explain(
    device: torch.device | str = "cuda",
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    causal: bool = True,
    has_documents: bool = False,
    has_window: bool = False,
    has_softcap: bool = False,
    wants_lse: bool = False,
    backend: str = "auto",
) -> tuple[str, str]:
    """What attention() runs for such tensors in training, a name of the table, and why.

    With wants_lse, what attention_forward() and attention_backward() run.
    """
    return _choose(
        device=torch.device(device),
        dtype=dtype,
        head_dim=head_dim,
        causal=causal,
        has_documents=has_documents,
        has_window=has_window,
        has_softcap=has_softcap,
        lengths=EQUAL,
        is_training=True,
        wants_lse=wants_lse,
        backend=backend,
    )


class _Asked(NamedTuple):
    """What a call asks for, beside its tensors."""

    causal: bool
    window: int | None
    scale: float | None
    softcap: float | None
    backend: str
    is_training: bool
    wants_lse: bool


class _Settled(NamedTuple):
    """What calls of a kind come to: the implementation, and its options.

    They are there once more by their names, as all implementations but ours take them.
    """

    name: str
    options: operators.Options
    named: dict[str, Any]


def _checked(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, asked: _Asked
) -> operators.Options:
    """The options with the defaults filled in; ValueError where something does not fit.

    A window that hides nothing is None.
    """
    causal, window, scale, softcap, *_ = asked
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    rank = 4 if cu_seqlens is None else 3
    if not q.dim() == k.dim() == v.dim() == rank:
        raise ValueError(f"attention: {shapes}: each has {rank} dimensions")
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[:-3] != k.shape[:-3]:
        raise ValueError(f"attention: {shapes} do not fit each other")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"attention: {q.shape[-2]} query heads over {k.shape[-2]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype}: one dtype")
    if not q.is_floating_point() or q.shape[-1] == 0:
        raise ValueError(f"attention: {shapes} {q.dtype}: heads of floating-point values")
    if cu_seqlens is not None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"attention: {shapes}: documents have as many queries as keys")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype != torch.int32:
            shape = tuple(cu_seqlens.shape)
            raise ValueError(
                f"attention: cu_seqlens {shape} {cu_seqlens.dtype}: (documents + 1,) int32"
            )
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"attention: window={window}, causal={causal}: 1 or more, causal alone")
    if scale is not None and not scale > 0:
        raise ValueError(f"attention: scale={scale}: it must be above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap={softcap}: it must be above 0")
    is_whole = window is not None and window >= k.shape[-3]
    # A graph with symbolic sizes holds for one head_dim: index() says so.
    head_dim = operator.index(q.shape[-1])
    scale = head_dim**-0.5 if scale is None else scale
    return operators.Options(causal, None if is_whole else window, scale, softcap)


_settled: dict[tuple[Any, ...], _Settled] = {}
when_forgetting(_settled.clear)
_MOST_SETTLED = 4096


def _settle(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, asked: _Asked) -> _Settled:
    """What a call comes to. Raises ValueError."""
    if torch.compiler.is_compiling():  # sizes may be symbols
        return _decide(q, k, v, cu_seqlens, asked)
    key = (
        *(q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device),
        None if cu_seqlens is None else (cu_seqlens.shape, cu_seqlens.dtype),
        *asked,
        requested_backend(),
        torch.are_deterministic_algorithms_enabled(),
    )
    try:
        found = _settled.get(key)
    except TypeError:  # sizes are symbols of a tracer, which have no hash
        return _decide(q, k, v, cu_seqlens, asked)
    if found is None:
        if len(_settled) >= _MOST_SETTLED:
            _settled.clear()
        found = _settled[key] = _decide(q, k, v, cu_seqlens, asked)
    return found


def _decide(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, asked: _Asked) -> _Settled:
    """As _settle(), anew."""
    options = _checked(q, k, v, cu_seqlens, asked)
    causal, window, scale, softcap = options
    name, _ = _choose(
        device=q.device,
        dtype=q.dtype,
        head_dim=operator.index(q.shape[-1]),
        causal=causal,
        has_documents=cu_seqlens is not None,
        has_window=window is not None,
        has_softcap=softcap is not None,
        lengths=_lengths(q, k),
        is_training=asked.is_training,
        wants_lse=asked.wants_lse,
        backend=asked.backend,
    )
    # The libraries differ in what they make of no rows at all.
    name = "torch" if q.numel() == 0 or k.numel() == 0 else name
    named: dict[str, Any] = {"causal": causal, "window": window, "scale": scale}
    if name != "sdpa_cpu":  # which has no word for a softcap, and is not chosen where there is one
        named["softcap"] = softcap
    return _Settled(name, options, named)


def _lengths(q: Tensor, k: Tensor) -> str:
    if q.shape[-3] == k.shape[-3]:
        return EQUAL
    return FEWER_QUERIES if q.shape[-3] < k.shape[-3] else MORE_QUERIES


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention by the fastest correct implementation that is there.

    Args:
        q: (batch, seq_q, H, d), or (tokens, H, d) with cu_seqlens; bf16, fp16 or fp32. Any strides:
            views into one packed tensor are not copied.
        k, v: (batch, seq_k, K, d) or (tokens, K, d) in q's dtype; H is a multiple of K.
        causal: the last query stands at the last key, and sees those before it.
        cu_seqlens: (documents + 1,) int32, where each document starts, from 0, and the number of
            tokens; documents may be empty. It stays on the device and is not checked.
        max_seqlen: tokens of the longest document, for libraries that want it; the number of
            tokens, which costs them time, where it is not given. Ours needs none.
        window: how many keys a query sees, itself included; as sliding_window of transformers.
        scale: of the scores; d ** -0.5 by default.
        softcap: softcap * tanh(s / softcap) in place of the scores s, as Gemma 2 has it.
        backend: "auto"; "sdpa" or "flash_attn" (the libraries); "triton" (ours); "torch" (the
            reference); or a name of the table in `choice`. NANOTRON_FAST_BACKEND=triton|torch
            overrules "auto".

    Returns:
        q's shape and dtype. A query that sees no key, and a token after the last document, has 0
        from "triton" and "torch".

    Raises:
        ValueError: shapes, dtypes or options do not fit, or `backend` cannot serve them.
    """
    needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
    is_training = needs_grad and torch.is_grad_enabled()
    asked = _Asked(causal, window, scale, softcap, backend, is_training, wants_lse=False)
    name, options, named = _settle(q, k, v, cu_seqlens, asked)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()  # a column of a table has strides
    if name == "triton":
        return operators.attend(q, k, v, cu_seqlens, options)
    if name == "torch":
        return attention_reference(q, k, v, cu_seqlens=cu_seqlens, **named)
    if name == "sdpa_cpu":
        return cpu.attend(q, k, v, cu_seqlens=cu_seqlens, **named)
    return library.attend(name, q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **named)


_nothing = nullcontext()


def _without_grad() -> AbstractContextManager[None]:
    """no_grad(), and nothing where it is on already: the two switches take 3 us."""
    return torch.no_grad() if torch.is_grad_enabled() else _nothing


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """out and lse, for blocks that write their own backward; no autograd.

    Arguments and errors as of attention(); flash_attn's packages do not serve here.

    Returns:
        out in q's shape and dtype; lse, natural logarithms in fp32, (batch, H, seq_q), or
        (H, tokens) with cu_seqlens.
    """
    asked = _Asked(causal, window, scale, softcap, backend, is_training=True, wants_lse=True)
    name, options, named = _settle(q, k, v, cu_seqlens, asked)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()  # a column of a table has strides
    with _without_grad():
        if name == "torch":
            return attention_forward_reference(q, k, v, cu_seqlens=cu_seqlens, **named)
        if name == "sdpa_cpu":
            return cpu.forward(q, k, v, cu_seqlens=cu_seqlens, **named)
        if name == "triton":
            return operators.forward(q, k, v, cu_seqlens, options)
        return library.forward(name, q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **named)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v, from what attention_forward() gave.

    Args:
        dout: out's shape and dtype.
        out, lse: of attention_forward() with the same options; by which backend does not matter.

    Raises:
        ValueError: as attention(), and where dout, out or lse do not fit q.
    """
    asked = _Asked(causal, window, scale, softcap, backend, is_training=True, wants_lse=True)
    name, options, named = _settle(q, k, v, cu_seqlens, asked)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()  # a column of a table has strides
    has_shapes = dout.shape == out.shape == q.shape and lse.shape == operators.lse_shape(q)
    if not has_shapes or not dout.dtype == out.dtype == q.dtype:
        raise ValueError(
            f"attention_backward: dout {tuple(dout.shape)} {dout.dtype}, out {tuple(out.shape)} "
            f"{out.dtype} and lse {tuple(lse.shape)} for q {tuple(q.shape)} {q.dtype}"
        )
    tensors = (dout, q, k, v, out, lse)
    with _without_grad():
        if name == "torch":
            return attention_backward_reference(*tensors, cu_seqlens=cu_seqlens, **named)
        if name == "sdpa_cpu":
            return cpu.backward(*tensors, cu_seqlens=cu_seqlens, **named)
        if name == "triton":
            return operators.backward(*tensors, cu_seqlens, options)
        return library.backward(
            name, *tensors, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **named
        )
