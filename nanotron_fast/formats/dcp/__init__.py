"""Folders that torch.distributed.checkpoint saves: `.metadata`, and chunks in `__R_N.distcp`."""

from __future__ import annotations

from pathlib import Path

METADATA = ".metadata"


def is_dcp_checkpoint(root: Path) -> bool:
    """Whether a directory looks like one."""
    return (root / METADATA).is_file()
