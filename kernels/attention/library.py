"""Attention by the libraries that are there: flash-attn 3 and 2, and torch's own.

`attend` is differentiable, by the library's own autograd. `forward` and `backward` call torch's
flash and cuDNN kernels directly, for blocks that keep out and lse themselves.
Shapes are those of `attention`; lse (batch, H, seq_q), or (H, tokens) with cu_seqlens.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache, lru_cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Where cuDNN refuses (one key, say) flash takes its place.
_SDPA_KERNELS = {
    "sdpa_cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
    "sdpa_flash": [SDPBackend.FLASH_ATTENTION],
}
_FLASH_MODULES = {
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_2": "flash_attn.flash_attn_interface",
}
_FLASH_OPTIONS = ("softmax_scale", "causal", "window_size", "softcap", "deterministic")


def _flash_module(name: str) -> ModuleType:
    return importlib.import_module(_FLASH_MODULES[name])


def _missing_flash(name: str) -> str:
    try:
        module = _flash_module(name)
    except ImportError as error:
        return f"does not import ({error})"
    if name == "flash_attn_3":
        is_real = hasattr(torch.ops.flash_attn_3, "fwd")
    else:
        # A stand-in has the functions of the real package, but not its compiled extension.
        extensions = (getattr(module, f"flash_attn_{kind}", None) for kind in ("gpu", "cuda"))
        is_real = any(getattr(e, "__name__", "") == "flash_attn_2_cuda" for e in extensions)
    if not is_real:
        return f"is a stand-in: {module.__name__} without its compiled kernels"
    for function in ("flash_attn_func", "flash_attn_varlen_func"):
        parameters = inspect.signature(getattr(module, function)).parameters
        lacking = [option for option in _FLASH_OPTIONS if option not in parameters]
        if lacking:
            return f"is too old: {function} takes no {lacking[0]}"
    return ""


def _varlen_parameters() -> tuple[str, ...]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ()
    return tuple(inspect.signature(varlen_attn).parameters)


@cache
def missing(name: str) -> str:
    """Why a library of the table in `choice` cannot be used here; empty where it can."""
    if name in _FLASH_MODULES:
        return _missing_flash(name)
    if name in ("sdpa_flash", "sdpa_varlen"):
        if not torch.backends.cuda.is_flash_attention_available():
            return "is not in this build of torch"
        lacking = {"window_size", "scale"}.difference(_varlen_parameters())
        if name == "sdpa_varlen" and lacking:
            return f"needs a torch whose varlen_attn takes {' and '.join(sorted(lacking))}"
    if name == "sdpa_cudnn":
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        # Older ones are wrong where a length is no multiple of 128 (pytorch issue 169849).
        if version is None or version <= 91500:
            return f"needs cuDNN above 9.15, not {version}"
    return ""


def _has_vectors(strides: tuple[int, ...], multiple: int) -> bool:
    return strides[-1] == 1 and all(step % multiple == 0 for step in strides[:-1])


_known_vectors = lru_cache(maxsize=4096)(_has_vectors)


def _vectors(tensor: Tensor) -> Tensor:
    """A copy, unless its heads can be loaded 16 bytes at a time, as these kernels do."""
    multiple = 16 // tensor.element_size()
    if torch.compiler.is_compiling():  # strides may be symbols, and no graph can hold an offset
        is_fit = _has_vectors(tensor.stride(), multiple)
    else:
        is_fit = _known_vectors(tensor.stride(), multiple)
        is_fit = is_fit and tensor.storage_offset() % multiple == 0
    return tensor if is_fit else tensor.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=4096)
def _dense_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


def _strides_of_out(q: Tensor) -> tuple[int, ...]:
    """Those of what cuDNN makes of q: dense, its dimensions in the order of q's."""
    if torch.compiler.is_compiling():  # strides may be symbols
        return torch.empty_like(q).stride()
    return _dense_strides(q.shape, q.stride())


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy of these strides, unless it has them.

    Until its pull request 191576 torch found cuDNN's graph of the backward pass by the strides of
    q, k and v alone: those of dout and out were as in the first call, others were read wrongly.
    """
    given = tensor.stride()
    if given == strides or all(
        size == 1 or its == wanted
        for size, its, wanted in zip(tensor.shape, given, strides, strict=True)
    ):
        return tensor
    copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _window_size(causal: bool, window: int | None) -> tuple[int, int]:
    """Keys to the left and to the right of a query's own; -1 is all of them."""
    if window is not None:
        return window - 1, 0
    return -1, 0 if causal else -1


def _attend_sdpa(
    name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    has_groups = q.shape[1] != k.shape[1]
    with sdpa_kernel(_SDPA_KERNELS[name], set_priority=True):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=has_groups
        )
    if name == "sdpa_cudnn" and out.requires_grad and not torch.compiler.is_compiling():
        out.register_hook(partial(_laid_out, strides=out.stride()))
    return out.transpose(1, 2)


def _attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scale, "window_size": _window_size(causal, window)}
    if "enable_gqa" in _varlen_parameters():
        options["enable_gqa"] = q.shape[-2] != k.shape[-2]
    if cu_seqlens is not None:
        longest = max_seqlen or q.shape[0]
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    ends = [
        torch.arange(0, (t.shape[0] + 1) * t.shape[1], t.shape[1], device=t.device).int()
        for t in (q, k)
    ]
    rows = (t.flatten(0, 1) for t in (q, k, v))
    return varlen_attn(*rows, *ends, q.shape[1], k.shape[1], **options).view(q.shape)


def attend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """out, by the library of that name, for autograd."""
    q, k, v = (_vectors(t) for t in (q, k, v))
    if name in _SDPA_KERNELS:
        return _attend_sdpa(name, q, k, v, causal=causal, scale=scale)
    if name == "sdpa_varlen":
        return _attend_varlen(
            q,
            k,
            v,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            causal=causal,
            window=window,
            scale=scale,
        )
    options = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": _window_size(causal, window),
        "softcap": softcap or 0.0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    module = _flash_module(name)
    if cu_seqlens is None:
        out = module.flash_attn_func(q, k, v, **options)
    else:
        longest = max_seqlen or q.shape[0]
        out = module.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            **options,
        )
    return out[0] if isinstance(out, tuple) else out  # early FlashAttention 3 returns lse too


def _longest(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> tuple[int, int]:
    """The most queries and keys of a sequence or document."""
    if cu_seqlens is None:
        return q.shape[1], k.shape[1]
    longest = max_seqlen or q.shape[0]
    return longest, longest


def _takes_cudnn(name: str, k: Tensor) -> bool:
    """It refuses a single key, for which flash takes its place, as torch has it in `attend`."""
    return name == "sdpa_cudnn" and k.shape[1] > 1


def forward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse, by torch's kernels."""
    q, k, v = (_vectors(t) for t in (q, k, v))
    if _takes_cudnn(name, k):
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, True, 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])
    left, right = _window_size(causal, window)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        *_longest(q, k, cu_seqlens, max_seqlen),
        0.0,
        causal and window is None,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out, lse


def backward(
    name: str,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, by torch's kernels."""
    dout, q, k, v, out = (_vectors(t) for t in (dout, q, k, v, out))
    # Both take its address alone, as if it lay as their forward passes give it.
    lse = lse.contiguous()
    longest = _longest(q, k, cu_seqlens, max_seqlen)
    # The state of a random generator is not read without dropout: no launch fills it.
    if _takes_cudnn(name, k):
        dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        strides = _strides_of_out(q)
        dout, out = _laid_out(dout, strides), _laid_out(out, strides)
        # cuDNN takes statistics of four dimensions alone, as its forward pass gives them.
        stats = lse.unsqueeze(-1)
        state = torch.empty(2, dtype=torch.int64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(dout, q, k, v, out, stats, state, state, None, None, None),
            *longest,
            0.0,
            causal,
            scale=scale,
        )
        return tuple(t.transpose(1, 2) for t in grads)
    left, right = _window_size(causal, window)
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens,
        cu_seqlens,
        *longest,
        0.0,
        causal and window is None,
        state,
        state,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
