"""Operation -> its cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.gpu.cases import elementwise, losses, optimizer, products
from benchmarks.gpu.cases.case import Case, Setting

CASES: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "rms_norm": elementwise.rms_norm_cases,
    "glu": elementwise.glu_cases,
    "rope_qkv": elementwise.rope_qkv_cases,
    "rope_apart": elementwise.rope_apart_cases,
    "attention": products.attention_cases,
    "cross_entropy": losses.cross_entropy_cases,
    "linear_cross_entropy": losses.linear_cross_entropy_cases,
    "embedding": losses.embedding_cases,
    "adamw": optimizer.adamw_cases,
    "accumulate": optimizer.accumulate_cases,
    "clip": optimizer.clip_cases,
    "pack": optimizer.pack_cases,
    "column_linear": products.column_linear_cases,
    "row_linear": products.row_linear_cases,
    "mlp_block": products.mlp_block_cases,
    "attention_block": products.attention_block_cases,
}


def all_cases(setting: Setting) -> Iterator[Case]:
    for make in CASES.values():
        yield from make(setting)
