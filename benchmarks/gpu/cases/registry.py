"""Operation -> its cases, imported when asked for: one that does not import fails alone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from benchmarks.gpu.cases.case import Case, Setting

# Operation -> the module of benchmarks.gpu.cases that has `<operation>_cases`.
MODULES = {
    "rms_norm": "elementwise",
    "glu": "elementwise",
    "rope_qkv": "rotary",
    "rope_apart": "rotary",
    "rope_normed": "rotary",
    "attention": "products",
    "cross_entropy": "losses",
    "linear_cross_entropy": "losses",
    "embedding": "losses",
    "adamw": "optimizer",
    "accumulate": "optimizer",
    "clip": "optimizer",
    "pack": "packing",
    "column_linear": "products",
    "row_linear": "products",
    "mlp_block": "blocks",
    "attention_block": "blocks",
}


def cases_of(operation: str, setting: Setting) -> Iterator[Case]:
    """The most telling case first."""
    module = importlib.import_module(f"benchmarks.gpu.cases.{MODULES[operation]}")
    cases: Iterator[Case] = getattr(module, f"{operation}_cases")(setting)
    return cases


def all_cases(setting: Setting) -> Iterator[Case]:
    for operation in MODULES:
        yield from cases_of(operation, setting)
