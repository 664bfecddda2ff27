"""Nanotron's model configuration classes, as objects."""

from nanotron_fast.formats.nanotron.classes.base import (
    EXTENSION_FIELDS,
    NanotronClass,
    class_of,
    classes,
    register,
)
from nanotron_fast.formats.nanotron.classes.llama import LLAMA_CONFIG, QWEN2_CONFIG
from nanotron_fast.formats.nanotron.classes.moe import MOE_FIELDS
from nanotron_fast.formats.nanotron.classes.starcoder2 import STARCODER2_CONFIG

__all__ = [
    "EXTENSION_FIELDS",
    "LLAMA_CONFIG",
    "MOE_FIELDS",
    "QWEN2_CONFIG",
    "STARCODER2_CONFIG",
    "NanotronClass",
    "class_of",
    "classes",
    "register",
]
