"""Norms and gated linear units: bound by the bytes they move."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Setting

_LIGER = "liger_kernel.transformers.functional"


def rms_norm_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.rms_norm import rms_norm, rms_norm_reference

    shapes = setting.pick(
        [(32768, 4096), (32768, 8192), (16384, 16384)],
        [(4, 96)],
        [(512, 1024)],
        [(1 << 27 >> power, 1 << power) for power in (12, 11, 13, 10, 14)],
    )
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
    from nanotron_fast.kernels.glu import glu, glu_reference

    shapes = setting.pick(
        [(8192, 16384), (8192, 14336)], [(4, 72)], [(512, 1024)], [(8192, 14336), (8192, 8192)]
    )
    for rows, inter in shapes:

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
