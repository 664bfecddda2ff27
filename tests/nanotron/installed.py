"""Which Nanotron is installed: by what it has, since main and the released 0.4 share a version."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def folder() -> Path | None:
    """Where Nanotron lies, without importing it; None where there is none."""
    spec = importlib.util.find_spec("nanotron")
    # A folder called nanotron, the tests' own for instance, is found too, but has no origin.
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def has_qwen2() -> bool:
    """Whether it is main."""
    found = folder()
    return found is not None and (found / "models/qwen.py").is_file()
