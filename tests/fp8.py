"""Quantised models by hand: the linear weights of a tiny model in FP8, as published models have it.

The arithmetic is written independently of nanotron_fast's, with torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.modelzoo import Model, Tensor

BLOCK = 128
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
_LARGEST = 448.0


def weights_of(tensor: Tensor) -> torch.Tensor:
    """A tensor of a file in torch."""
    return torch.frombuffer(bytearray(tensor.data), dtype=TORCH[tensor.dtype]).view(tensor.shape)


def tensor_of(values: torch.Tensor) -> Tensor:
    """The other way."""
    names = {
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e8m0fnu: "F8_E8M0",
        **{dtype: name for name, dtype in TORCH.items()},
    }
    data = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return Tensor(names[values.dtype], tuple(values.shape), data)


def is_quantised(name: str) -> bool:
    """Published models leave embedding, head and norms as they are."""
    return name.endswith("_proj.weight")


def spread(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The scale of each element of a matrix, whose blocks at the edges are cut short."""
    wide = scales.float().repeat_interleave(BLOCK, 0)[:rows]
    return wide.repeat_interleave(BLOCK, 1)[:, :columns]


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a matrix, and a scale for each block of 128 x 128."""
    rows, columns = weight.shape
    grid = -(-rows // BLOCK), -(-columns // BLOCK)
    scales = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            block = weight[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            scales[i, j] = block.float().abs().max() / _LARGEST
    return (weight.float() / spread(scales, rows, columns)).to(torch.float8_e4m3fn), scales


def stack_in_blocks(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a stack of matrices, whose blocks end where a matrix does."""
    pairs = [in_blocks(matrix) for matrix in stack]
    codes, scales = (torch.stack(each) for each in zip(*pairs, strict=True))
    return codes, scales


def quantised(model: Model, *, config: dict[str, Any] = CONFIG) -> tuple[Model, Model]:
    """The model with its linear weights in blocks, and what they are once dequantised to bf16."""
    coded, plain = dict(model.tensors), dict(model.tensors)
    for name, tensor in model.tensors.items():
        if is_quantised(name):
            codes, scales = in_blocks(weights_of(tensor))
            coded[name], coded[f"{name}_scale_inv"] = tensor_of(codes), tensor_of(scales)
            values = (codes.float() * spread(scales, *codes.shape)).bfloat16()
            plain[name] = tensor_of(values)
    stated = {**model.config, "quantization_config": config}
    return (
        Model(model.family, {**stated, "torch_dtype": "bfloat16"}, coded),
        Model(model.family, {**model.config, "torch_dtype": "bfloat16"}, plain),
    )


def names_of_quantised(model: Model) -> Iterator[str]:
    """The weights that are in codes."""
    return (name for name, tensor in model.tensors.items() if tensor.dtype == "F8_E4M3")
