"""Norms, gated linear units and rotary embedding: bound by the bytes they move."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Setting
from nanotron_fast.kernels.glu import glu, glu_reference
from nanotron_fast.kernels.rms_norm import rms_norm, rms_norm_reference
from nanotron_fast.kernels.rope import rope_qkv, rope_qkv_reference, rope_tables
from nanotron_fast.kernels.rope.apart import rope_apart, rope_apart_reference

_LIGER = "liger_kernel.transformers.functional"


def rms_norm_cases(setting: Setting) -> Iterator[Case]:
    shapes = setting.pick([(32768, 4096), (32768, 8192), (16384, 16384)], [(4, 96)], [(512, 1024)])
    for rows, hidden in shapes:
        item = setting.dtype.itemsize

        def tensors(rows: int = rows, hidden: int = hidden) -> list[Tensor]:
            return [setting.randn(rows, hidden), setting.randn(hidden)]

        plain = Case(
            "rms_norm",
            f"{rows}x{hidden}",
            tensors,
            {
                "torch": lambda x, w: rms_norm_reference(x, w, 1e-6),
                "torch F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
                "torch.compile": setting.compile(lambda x, w: rms_norm_reference(x, w, 1e-6)),
                "ours": lambda x, w: rms_norm(x, w, 1e-6),
            },
            bytes_forward=2 * rows * hidden * item,
            bytes_backward=3 * rows * hidden * item,
        )
        plain.add_peer(
            "liger", _LIGER, "liger_rms_norm", lambda f, x, w: f(x, w, 1e-6, in_place=False)
        )
        yield plain.add_peer("quack", "quack", "rmsnorm", lambda f, x, w: f(x, w, eps=1e-6))

        def with_residual(rows: int = rows, hidden: int = hidden) -> list[Tensor]:
            return [setting.randn(rows, hidden), setting.randn(hidden), setting.randn(rows, hidden)]

        added = Case(
            "rms_norm",
            f"{rows}x{hidden} with residual",
            with_residual,
            {
                "torch": lambda x, w, r: rms_norm_reference(x, w, 1e-6, r),
                "torch.compile": setting.compile(lambda x, w, r: rms_norm_reference(x, w, 1e-6, r)),
                "ours": lambda x, w, r: rms_norm(x, w, 1e-6, r),
            },
            bytes_forward=4 * rows * hidden * item,
            bytes_backward=4 * rows * hidden * item,
        )
        yield added.add_peer(
            "liger",
            _LIGER,
            "liger_fused_add_rms_norm",
            lambda f, x, w, r: f(x, r, w, 1e-6, in_place=False),
        )


def glu_cases(setting: Setting) -> Iterator[Case]:
    for rows, inter in setting.pick([(8192, 16384), (8192, 14336)], [(4, 72)], [(512, 1024)]):

        def tensors(rows: int = rows, inter: int = inter) -> list[Tensor]:
            return [setting.randn(rows, 2 * inter)]

        case = Case(
            "glu",
            f"{rows}x{inter}",
            tensors,
            {"torch": glu_reference, "torch.compile": setting.compile(glu_reference), "ours": glu},
            bytes_forward=3 * rows * inter * setting.dtype.itemsize,
            bytes_backward=5 * rows * inter * setting.dtype.itemsize,
        )
        yield case.add_peer("liger", _LIGER, "liger_swiglu", lambda f, x: f(*x.chunk(2, -1)))


def _rope_shapes(setting: Setting) -> list[tuple[int, int, int, int]]:
    real = [(8192, 32, 8, 128), (8192, 32, 32, 128)]
    return setting.pick(real, [(6, 4, 2, 16)], [(512, 8, 2, 64)])


def rope_qkv_cases(setting: Setting) -> Iterator[Case]:
    for tokens, q_heads, kv_heads, head_dim in _rope_shapes(setting):
        cos, sin = rope_tables(head_dim, tokens, device=setting.device)
        options = (cos, sin, q_heads, kv_heads, head_dim)
        width = (q_heads + 2 * kv_heads) * head_dim

        def tensors(tokens: int = tokens, width: int = width) -> list[Tensor]:
            return [setting.randn(tokens, width)]

        yield Case(
            "rope_qkv",
            f"{tokens} tokens, {q_heads}+2x{kv_heads} heads of {head_dim}",
            tensors,
            {
                "torch": lambda x, o=options: rope_qkv_reference(x, *o),
                "torch.compile": setting.compile(lambda x, o=options: rope_qkv_reference(x, *o)),
                "ours": lambda x, o=options: rope_qkv(x, *o),
            },
            bytes_forward=2 * tokens * width * setting.dtype.itemsize,
            bytes_backward=2 * tokens * width * setting.dtype.itemsize,
        )


def rope_apart_cases(setting: Setting) -> Iterator[Case]:
    for tokens, q_heads, kv_heads, head_dim in _rope_shapes(setting):
        tables = rope_tables(head_dim, tokens, device=setting.device)
        shapes = ((tokens, q_heads, head_dim), (tokens, 2, kv_heads, head_dim))

        def tensors(shapes: tuple[tuple[int, ...], ...] = shapes) -> list[Tensor]:
            return [setting.randn(*shape) for shape in shapes]

        num_bytes = 2 * tokens * (q_heads + 2 * kv_heads) * head_dim * setting.dtype.itemsize
        yield Case(
            "rope_apart",
            f"{tokens} tokens, {q_heads} and 2x{kv_heads} heads of {head_dim}",
            tensors,
            {
                "torch": lambda q, kv, t=tables: rope_apart_reference(q, kv, *t),
                "torch.compile": setting.compile(
                    lambda q, kv, t=tables: rope_apart_reference(q, kv, *t)
                ),
                "ours": lambda q, kv, t=tables: rope_apart(q, kv, *t),
            },
            bytes_forward=num_bytes,
            bytes_backward=num_bytes,
        )
