"""The element types that a checkpoint may hold, under the names of each format."""

from __future__ import annotations

import enum

from nanotron_fast.errors import ConfigError


class Dtype(enum.IntEnum):
    """A floating-point type; the value is the code that the native engine knows it by."""

    BF16 = 0
    F16 = 1
    F32 = 2
    F64 = 3

    def __bool__(self) -> bool:
        """True: BF16, whose code is 0, is as much a choice as the others in `cast or stored`."""
        return True

    @property
    def itemsize(self) -> int:
        """Bytes an element takes."""
        return _ITEMSIZE[self]

    @property
    def bits(self) -> int:
        """Bits an element takes."""
        return 8 * self.itemsize

    @property
    def torch_name(self) -> str:
        """As in config.json's `torch_dtype`: "bfloat16"."""
        return _TORCH_NAME[self]

    @property
    def short_name(self) -> str:
        """As in `--dtype`: "bf16"."""
        return _SHORT_NAME[self]


_ITEMSIZE = {Dtype.BF16: 2, Dtype.F16: 2, Dtype.F32: 4, Dtype.F64: 8}
_TORCH_NAME = {
    Dtype.BF16: "bfloat16",
    Dtype.F16: "float16",
    Dtype.F32: "float32",
    Dtype.F64: "float64",
}
_SHORT_NAME = {Dtype.BF16: "bf16", Dtype.F16: "fp16", Dtype.F32: "fp32", Dtype.F64: "fp64"}

# Bits an element takes, for every dtype that the safetensors format knows.
SAFETENSORS_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "U64": 64,
    "I64": 64,
}


def parse_cast(name: str) -> Dtype | None:
    """The dtype that `--dtype` names; None for "keep". Raises ConfigError."""
    if name == "keep":
        return None
    for dtype in (Dtype.BF16, Dtype.F16, Dtype.F32):
        if name in (dtype.short_name, dtype.torch_name):
            return dtype
    raise ConfigError(f"dtype {name!r}: choose keep, bf16, fp16 or fp32")
