"""Nanotron's model configuration classes, and this package's own, as objects."""

from nanotron_fast.formats.nanotron.classes.base import (
    HEAD_DIM,
    NanotronClass,
    StockClass,
    class_of,
    classes,
    register,
)
from nanotron_fast.formats.nanotron.classes.llama import LLAMA_CONFIG, QWEN2_CONFIG
from nanotron_fast.formats.nanotron.classes.moe import MOE_FIELDS
from nanotron_fast.formats.nanotron.classes.own import NANOTRON_FAST_CONFIG
from nanotron_fast.formats.nanotron.classes.starcoder2 import STARCODER2_CONFIG

__all__ = [
    "HEAD_DIM",
    "LLAMA_CONFIG",
    "MOE_FIELDS",
    "NANOTRON_FAST_CONFIG",
    "QWEN2_CONFIG",
    "STARCODER2_CONFIG",
    "NanotronClass",
    "StockClass",
    "class_of",
    "classes",
    "register",
]
