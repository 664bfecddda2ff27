"""flash_attn.flash_attn_interface of 2.6: attention with its names, arguments and defaults.

Shapes: q (batch, seq_q, H, d), k and v (batch, seq_k, K, d), kv (batch, seq_k, 2, K, d), qkv
(batch, seq, 3, H, d); varlen: (tokens, ...) in place of (batch, seq, ...), cu_seqlens
(documents + 1,) int32. Query i of seq_q stands at position i + seq_k - seq_q. softmax_scale is
1 / sqrt(d) where None; a softcap of 0 is none; window_size (left, right), -1 for no bound.

With return_attn_probs the functions return (out, softmax_lse, None), as the real ones do without
dropout: lse (batch, H, seq_q) or (H, tokens), fp32, without a gradient.

Of the wider interface dropout, alibi, paged caches and windows that look ahead are refused. fp32
and fp64 are accepted, and tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from nanotron_fast.kernels.attention import attention
from nanotron_fast.patch.nanotron.attention_with_lse import attention_with_lse
from nanotron_fast.patch.stand_ins.arguments import refuse

Window = tuple[int, int]
Result: TypeAlias = "Tensor | tuple[Tensor, Tensor, None]"
ANYWHERE = (-1, -1)


def _options(
    function: str,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> dict[str, Any]:
    """The options of our attention. Raises NotImplementedError for what it does not do."""
    left, right = window_size
    # As in flash-attn, a window that ends at the query is a causal mask.
    causal = causal or right == 0
    refuse(
        function,
        dropout_p=dropout_p > 0,
        window_size=not causal and (left, right) != ANYWHERE,
        alibi_slopes=alibi_slopes is not None,
        deterministic=deterministic,
    )
    return {
        "causal": causal,
        "window": left + 1 if left >= 0 else None,
        "scale": softmax_scale,
        "softcap": softcap or None,
    }


def _attend(q: Tensor, k: Tensor, v: Tensor, with_lse: bool, **options: Any) -> Result:
    if with_lse:
        return *attention_with_lse(q, k, v, **options), None
    return attention(q, k, v, **options)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = ANYWHERE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Returns (batch, seq_q, H, d)."""
    options = _options(
        "flash_attn_func",
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
    )
    return _attend(q, k, v, return_attn_probs, **options)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_func` with k and v in one tensor."""
    return flash_attn_func(q, *kv.unbind(2), *args, **kwargs)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_func` with q, k and v in one tensor."""
    return flash_attn_func(*qkv.unbind(2), *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = ANYWHERE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Returns (tokens, H, d). Documents may have more keys than queries, or fewer."""
    refuse("flash_attn_varlen_func", block_table=block_table is not None)
    options = _options(
        "flash_attn_varlen_func",
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
    )
    if _are_same_documents(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        options |= {"cu_seqlens": cu_seqlens_q, "max_seqlen": max_seqlen_q}
        return _attend(q, k, v, return_attn_probs, **options)
    results = [
        _attend(q_part[None], k_part[None], v_part[None], return_attn_probs, **options)
        for q_part, k_part, v_part in _documents(q, k, v, cu_seqlens_q, cu_seqlens_k)
    ]
    if not return_attn_probs:
        return torch.cat(results, dim=1).squeeze(0)
    outs, lses, _ = zip(*results, strict=True)
    return torch.cat(outs, dim=1).squeeze(0), torch.cat(lses, dim=2).squeeze(0), None


def _are_same_documents(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> bool:
    """Whether the queries' documents are the keys'."""
    if cu_seqlens_q is cu_seqlens_k:
        return True
    if len(q) != len(k) or max_seqlen_q != max_seqlen_k or len(cu_seqlens_q) != len(cu_seqlens_k):
        return False
    if not cu_seqlens_q.is_cuda:
        return torch.equal(cu_seqlens_q, cu_seqlens_k)
    # Nanotron makes the same numbers twice, in every layer. To read them here would hold up the
    # launching of all kernels: the device checks them when it comes to it.
    torch._assert_async(
        (cu_seqlens_q == cu_seqlens_k).all(),
        "flash_attn_varlen_func: as many queries as keys, and documents of other lengths",
    )
    return True


def _documents(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of one document after the other. Waits for the device."""
    q_lengths = cu_seqlens_q.diff().tolist()
    k_lengths = cu_seqlens_k.diff().tolist()
    return zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *args: Any,
    **kwargs: Any,
) -> Result:
    """`flash_attn_varlen_func` with k and v in one tensor."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args, **kwargs
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Result:
    """`flash_attn_varlen_func` with q, k and v in one tensor."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs
    )


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = ANYWHERE,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """Attention of q over the caches (batch, seq_cache, K, d), without a gradient.

    k and v (batch, seq_new, K, d) are first written into the caches, from cache_seqlens on: an
    int or (batch,), the filled length of each row, all of it where None. num_splits is the real
    one's schedule. Reads cache_seqlens, so waits for the device.
    """
    refuse(
        "flash_attn_with_kvcache",
        rotary_cos=rotary_cos is not None,
        rotary_sin=rotary_sin is not None,
        cache_batch_idx=cache_batch_idx is not None,
        cache_leftpad=cache_leftpad is not None,
        block_table=block_table is not None,
        return_softmax_lse=return_softmax_lse,
    )
    options = _options(
        "flash_attn_with_kvcache",
        *(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False),
    )
    filled = k_cache.shape[1] if cache_seqlens is None else cache_seqlens
    lengths = filled.tolist() if isinstance(filled, Tensor) else [filled] * len(q)
    out = torch.empty_like(q)
    for row, length in enumerate(lengths):
        end = length
        if k is not None and v is not None:
            end = length + k.shape[1]
            if end > k_cache.shape[1]:
                raise ValueError(
                    f"flash_attn_with_kvcache: row {row} would end at {end} "
                    f"in a cache of {k_cache.shape[1]}"
                )
            k_cache[row, length:end] = k[row]
            v_cache[row, length:end] = v[row]
        one = slice(row, row + 1)
        out[one] = attention(q[one], k_cache[one, :end], v_cache[one, :end], **options)
    return out


def _absent(name: str) -> Callable[..., NoReturn]:
    """Ring attention imports these, and calls them under context parallelism alone."""

    def function(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: nanotron_fast's stand-in for flash_attn has no context parallelism: "
            "set context_parallel_size to 1, or install flash-attn"
        )

    function.__name__ = function.__qualname__ = name
    return function


_flash_attn_varlen_forward = _absent("_flash_attn_varlen_forward")
_flash_attn_varlen_backward = _absent("_flash_attn_varlen_backward")
