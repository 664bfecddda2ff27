"""The packers: bytes that go where they belong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Setting
from nanotron_fast.kernels.pack import explain, pack_qkv, shard
from nanotron_fast.kernels.runtime.backend import ENVIRONMENT_VARIABLE


def _in_triton(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same by the packer in Triton, also where there is the one in CUDA."""

    def call(*tensors: Tensor) -> Any:
        asked = os.environ.get(ENVIRONMENT_VARIABLE, "")
        os.environ[ENVIRONMENT_VARIABLE] = "triton"
        try:
            return function(*tensors)
        finally:
            os.environ[ENVIRONMENT_VARIABLE] = asked

    return call


def pack_cases(setting: Setting) -> Iterator[Case]:
    # Of 70 B parameters: so long that the ends of a launch are little beside it.
    rows, width = setting.pick(
        ((8192, 1024, 1024), 8192), ((16, 8, 8), 12), ((4096, 1024, 1024), 1024)
    )

    ranks = setting.pick(8, 2, 8)

    def by_torch(*tensors: Tensor) -> list[Tensor]:
        return [torch.cat(part) for part in zip(*(t.chunk(ranks) for t in tensors), strict=True)]

    def columns_by_torch(tensor: Tensor) -> list[Tensor]:
        return [part.to(setting.dtype).contiguous() for part in tensor.chunk(ranks, 1)]

    whole = setting.pick((4096, 14336), (16, 64), (1024, 1024))
    item = setting.dtype.itemsize
    cases = [
        Case(
            "pack",
            f"q, k, v of {width} into {ranks} ranks",
            lambda: [torch.randn(n, width, device=setting.device).to(setting.dtype) for n in rows],
            {"torch": by_torch, "ours": lambda *t: pack_qkv(*t, ranks)},
            bytes_forward=2 * sum(rows) * width * item,
            tolerance=0.0,
        ),
        Case(
            "pack",
            f"{whole[0]}x{whole[1]} of fp32 into columns of {ranks} ranks",
            lambda: [torch.randn(whole, device=setting.device)],
            {
                "torch": columns_by_torch,
                "ours": lambda t: shard(t, 1, ranks, dtype=setting.dtype),
            },
            bytes_forward=whole[0] * whole[1] * (4 + item),
            tolerance=0.0,
        ),
    ]
    path, why = explain(setting.device)
    for case in cases:
        case.paths["ours"] = path
        if setting.size in ("real", "swept"):
            case.variants["ours, Triton"] = _in_triton(case.variants["ours"])
        if path != "cuda":
            case.absent["the packer in CUDA"] = f"ours is in {path}: {why}"
        if find_spec("nanotron_fast._C") is None:
            for name in [name for name in case.variants if name.startswith("ours")]:
                del case.variants[name]
                case.absent[name] = "nanotron_fast._C is not built, which checks the table of moves"
        yield case
