"""A training step of ours, and of those that a user would choose between, side by side."""

from __future__ import annotations

from benchmarks.gpu.context import Context
from benchmarks.gpu.rows import emit
from benchmarks.training.variants import lacking


def run(operation: str, variant: str, context: Context) -> None:
    """Emits the row of a setting (`operation`) of benchmarks/training and one of its variants."""
    note = lacking(variant)
    if note:  # before what needs it is imported
        emit({"kind": "step", "operation": operation, "variant": variant, "ok": None, "note": note})
        return
    from benchmarks.training.row import row

    emit(row(operation, variant, dry=context.dry))
