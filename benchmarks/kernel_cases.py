"""What the kernels are timed on: ours beside eager torch, torch.compile, and peers if installed.

A case is one operation at one shape. Each of its variants is a function of the same tensors; the
first is the reference that all others must agree with before anything is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy
from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy
from nanotron_fast.kernels.rms_norm import rms_norm, rms_norm_reference
from nanotron_fast.kernels.rope import rope_qkv, rope_qkv_reference, rope_tables
from nanotron_fast.kernels.swiglu import glu, glu_reference

Outputs = Sequence[Tensor]


@dataclass
class Case:
    """One operation at one shape.

    `tensors` are made anew for each variant, so that one that works in place cannot disturb
    another. `bytes_forward` and so on are the floors: what must move, or be computed, at least.
    """

    op: str
    shape: str
    tensors: Callable[[], list[Tensor]]
    # Name -> function of the tensors; the first is the reference.
    variants: dict[str, Callable[..., Tensor | Outputs]]
    bytes_forward: int | None = None
    bytes_backward: int | None = None
    flops_forward: int | None = None
    flops_backward: int | None = None
    # Of the reference's largest value.
    tolerance: float = 2e-2
    # Forward and backward are timed as one where backward may run once only.
    is_joint: bool = False
    absent: dict[str, str] = field(default_factory=dict)


def peer(module: str, name: str) -> Callable[..., Any] | None:
    """A function of another package, or None where it is not installed or does not import."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # peers fail in many ways where a GPU or a dependency is missing
        return None


def _add_peer(case: Case, name: str, function: Callable | None, call: Callable) -> Case:
    if function is None:
        case.absent[name] = "not installed, or does not import here"
    else:
        case.variants[name] = partial(call, function)
    return case


def _randn(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()


def rms_norm_cases(device, dtype, shapes) -> Iterator[Case]:
    for rows, hidden in shapes:
        item = dtype.itemsize

        def tensors(rows=rows, hidden=hidden) -> list[Tensor]:
            return [_randn(device, dtype, rows, hidden), _randn(device, dtype, hidden)]

        plain = Case(
            "rms_norm",
            f"{rows}x{hidden}",
            tensors,
            {
                "torch": lambda x, w: rms_norm_reference(x, w, 1e-6),
                "torch F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
                "torch.compile": torch.compile(lambda x, w: rms_norm_reference(x, w, 1e-6)),
                "ours": lambda x, w: rms_norm(x, w, 1e-6),
            },
            bytes_forward=2 * rows * hidden * item,
            bytes_backward=3 * rows * hidden * item,
        )
        liger = peer("liger_kernel.transformers.functional", "liger_rms_norm")
        _add_peer(plain, "liger", liger, lambda f, x, w: f(x, w, 1e-6, in_place=False))
        quack = peer("quack", "rmsnorm")
        yield _add_peer(plain, "quack", quack, lambda f, x, w: f(x, w, eps=1e-6))

        def with_residual(rows=rows, hidden=hidden) -> list[Tensor]:
            x, weight = tensors(rows, hidden)
            return [x, weight, _randn(device, dtype, rows, hidden)]

        added = Case(
            "rms_norm + residual",
            f"{rows}x{hidden}",
            with_residual,
            {
                "torch": lambda x, w, r: rms_norm_reference(x, w, 1e-6, r),
                "torch.compile": torch.compile(lambda x, w, r: rms_norm_reference(x, w, 1e-6, r)),
                "ours": lambda x, w, r: rms_norm(x, w, 1e-6, r),
            },
            bytes_forward=4 * rows * hidden * item,
            bytes_backward=4 * rows * hidden * item,
        )
        liger = peer("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")
        yield _add_peer(added, "liger", liger, lambda f, x, w, r: f(x, r, w, 1e-6, in_place=False))


def glu_cases(device, dtype, shapes) -> Iterator[Case]:
    for rows, inter in shapes:

        def tensors(rows=rows, inter=inter) -> list[Tensor]:
            return [_randn(device, dtype, rows, 2 * inter)]

        case = Case(
            "glu",
            f"{rows}x{inter}",
            tensors,
            {
                "torch": glu_reference,
                "torch.compile": torch.compile(glu_reference),
                "ours": glu,
            },
            bytes_forward=3 * rows * inter * dtype.itemsize,
            bytes_backward=5 * rows * inter * dtype.itemsize,
        )
        liger = peer("liger_kernel.transformers.functional", "liger_swiglu")
        yield _add_peer(case, "liger", liger, lambda f, x: f(*x.chunk(2, -1)))


def rope_cases(device, dtype, shapes) -> Iterator[Case]:
    for tokens, q_heads, kv_heads, head_dim in shapes:
        cos, sin = rope_tables(head_dim, tokens, device=device)
        options = (cos, sin, q_heads, kv_heads, head_dim)
        width = (q_heads + 2 * kv_heads) * head_dim

        def tensors(tokens=tokens, width=width) -> list[Tensor]:
            return [_randn(device, dtype, tokens, width)]

        yield Case(
            "rope_qkv",
            f"{tokens} tokens, {q_heads}+2x{kv_heads} heads of {head_dim}",
            tensors,
            {
                "torch": lambda x, o=options: rope_qkv_reference(x, *o),
                "torch.compile": torch.compile(lambda x, o=options: rope_qkv_reference(x, *o)),
                "ours": lambda x, o=options: rope_qkv(x, *o),
            },
            bytes_forward=2 * tokens * width * dtype.itemsize,
            bytes_backward=2 * tokens * width * dtype.itemsize,
        )


def cross_entropy_cases(device, dtype, shapes) -> Iterator[Case]:
    for tokens, vocab in shapes:
        target = torch.randint(0, vocab, (tokens,), device=device)

        # Not a leaf, as behind the head's product: over a leaf the gradient is not written.
        def tensors(tokens=tokens, vocab=vocab) -> list[Tensor]:
            return [_randn(device, dtype, tokens, vocab) * 1]

        def torch_loss(x: Tensor, target=target) -> Tensor:
            return F.cross_entropy(x.float(), target, reduction="none")

        case = Case(
            "vocab_parallel_cross_entropy",
            f"{tokens}x{vocab}",
            tensors,
            {
                "torch": torch_loss,
                "torch.compile": torch.compile(torch_loss),
                "ours": lambda x, t=target: vocab_parallel_cross_entropy(x, t),
            },
            bytes_forward=tokens * vocab * dtype.itemsize,
            bytes_backward=2 * tokens * vocab * dtype.itemsize,
            is_joint=True,
        )
        liger = peer("liger_kernel.transformers.functional", "liger_cross_entropy")
        _add_peer(case, "liger", liger, lambda f, x, t=target: f(x, t, reduction="none"))
        quack = peer("quack", "cross_entropy")
        yield _add_peer(case, "quack", quack, lambda f, x, t=target: f(x, t, reduction="none"))


def linear_cross_entropy_cases(device, dtype, shapes) -> Iterator[Case]:
    for tokens, hidden, vocab in shapes:
        target = torch.randint(0, vocab, (tokens,), device=device)

        def tensors(tokens=tokens, hidden=hidden, vocab=vocab) -> list[Tensor]:
            weight = _randn(device, dtype, vocab, hidden, scale=hidden**-0.5)
            return [_randn(device, dtype, tokens, hidden), weight]

        def torch_loss(x: Tensor, weight: Tensor, target=target) -> Tensor:
            return F.cross_entropy((x @ weight.t()).float(), target)

        flops = 2 * tokens * hidden * vocab
        case = Case(
            "linear_cross_entropy",
            f"{tokens}x{hidden}x{vocab}",
            tensors,
            {
                "torch": torch_loss,
                "ours": lambda x, w, t=target: linear_cross_entropy(x, w, t),
            },
            flops_forward=flops,
            flops_backward=2 * flops,
            is_joint=True,
        )
        liger = peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        yield _add_peer(case, "liger", liger, lambda f, x, w, t=target: f(x, w, t))


def attention_cases(device, dtype, shapes) -> Iterator[Case]:
    for batch, seq, q_heads, kv_heads, head_dim in shapes:

        def tensors(b=batch, s=seq, h=q_heads, k=kv_heads, d=head_dim) -> list[Tensor]:
            return [_randn(device, dtype, b, s, n, d) for n in (h, k, k)]

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2)

        flops = 2 * batch * seq * seq * q_heads * head_dim  # two products, half of each masked
        yield Case(
            "attention, causal",
            f"{batch}x{seq}, {q_heads}/{kv_heads} heads of {head_dim}",
            tensors,
            {
                "torch SDPA": sdpa,
                "ours, auto": lambda q, k, v: attention(q, k, v),
                "ours, Triton": lambda q, k, v: attention(q, k, v, backend="triton"),
            },
            flops_forward=flops,
            flops_backward=5 * flops // 2,
        )


def gpu_cases(device: torch.device) -> Iterator[Case]:
    """The shapes of the targets."""
    dtype = torch.bfloat16
    yield from rms_norm_cases(device, dtype, [(32768, 4096), (32768, 8192)])
    yield from glu_cases(device, dtype, [(8192, 16384), (8192, 14336)])
    yield from rope_cases(device, dtype, [(8192, 32, 8, 128), (8192, 32, 32, 128)])
    yield from cross_entropy_cases(device, dtype, [(8192, 131072), (8192, 32000)])
    yield from linear_cross_entropy_cases(device, dtype, [(4096, 4096, 131072)])
    yield from attention_cases(
        device, dtype, [(1, 8192, 32, 8, 128), (1, 16384, 32, 8, 128), (4, 4096, 32, 32, 64)]
    )


def cpu_cases() -> Iterator[Case]:
    """Small shapes in fp32, for the references."""
    device, dtype = torch.device("cpu"), torch.float32
    yield from rms_norm_cases(device, dtype, [(512, 1024)])
    yield from glu_cases(device, dtype, [(512, 1024)])
    yield from rope_cases(device, dtype, [(512, 8, 2, 64)])
    yield from cross_entropy_cases(device, dtype, [(256, 8192)])
    yield from linear_cross_entropy_cases(device, dtype, [(256, 256, 4096)])
    yield from attention_cases(device, dtype, [(1, 256, 8, 2, 64)])
