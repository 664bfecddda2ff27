"""How a published model says that its weights are quantised, and which tensors that concerns.

`quantization_config` of config.json names the method. Of "fp8" a weight is F8_E4M3, and its scales
lie beside it; of "mxfp4" a stack of experts X is two tensors of bytes, X_blocks and X_scales.
Source: transformers, `integrations/finegrained_fp8.py` and `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

QUANTIZATION = "quantization_config"
FP8, MXFP4 = "fp8", "mxfp4"

# What a group of elements that have one scale takes in MXFP4.
GROUP_ELEMENTS = 32
GROUP_BYTES = 16

_DTYPES = {FP8: frozenset({"F8_E4M3", "F8_E8M0", "U8"}), MXFP4: frozenset({"U8"})}
_FORMATS = (None, "e4m3", "e4m3fn", "float8_e4m3fn")
_DEFAULT_BLOCK = (128, 128)
# Behind a weight's own name, and in place of its last word, "weight".
_SCALES = ("_scale_inv", "_scale")
_SCALES_OF_MODULE = ("scale", "qscale_weight")
# What a model that runs in fp8 scales its activations by.
_ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act")
_WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a configuration says of its quantised tensors.

    Args:
        method: FP8 or MXFP4.
        block: rows and columns of a matrix that have one scale, where tensors have blocks.
        is_stated: the configuration gives the block.
    """

    method: str
    block: tuple[int, int] = _DEFAULT_BLOCK
    is_stated: bool = False

    @property
    def dtypes(self) -> frozenset[str]:
        """Those of the tensors that it concerns, by their safetensors names."""
        return _DTYPES[self.method]

    def __str__(self) -> str:
        """As in "fp8 (128x128 blocks)"."""
        if self.method == MXFP4:
            return f"{MXFP4} (blocks of {GROUP_ELEMENTS})"
        rows, columns = self.block
        blocks = f"{rows}x{columns} blocks" if self.is_stated else "a scale for a tensor or a row"
        return f"{FP8} ({blocks})"


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """What `quantization_config` says; None of a scheme that is not read here, or without one."""
    stated = config.get(QUANTIZATION)
    if not isinstance(stated, Mapping):
        return None
    method = stated.get("quant_method")
    if method == MXFP4:
        return Quantization(MXFP4)
    if method != FP8 or stated.get("fmt") not in _FORMATS:
        return None
    block = stated.get("weight_block_size")
    if block is None:
        return Quantization(FP8)
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(map(_is_size, block))):
        return None
    return Quantization(FP8, (block[0], block[1]), is_stated=True)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def names_of_scales(name: str) -> Iterator[str]:
    """What the scales of a weight in fp8 may be called, the usual name first."""
    yield from (name + ending for ending in _SCALES)
    module = name.removesuffix(_WEIGHT)
    if module != name:
        yield from (module + word for word in _SCALES_OF_MODULE)


def names_of_activation_scales(name: str) -> Iterator[str]:
    """What the scales of activations beside a weight may be called: training needs none."""
    module = name.removesuffix(_WEIGHT)
    begin = name + "_" if module == name else module
    yield from (begin + word for word in _ACTIVATIONS)


def packed_names(name: str) -> tuple[str, str]:
    """The two tensors of a stack in MXFP4: its codes, and its scales."""
    return f"{name}_blocks", f"{name}_scales"
