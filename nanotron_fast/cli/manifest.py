"""`verify` with one checkpoint: against its own manifest."""

from __future__ import annotations

from nanotron_fast.checkpoints.check_manifest import ManifestCheck, check_manifest
from nanotron_fast.checkpoints.options import VerifyChoices, spelled
from nanotron_fast.cli import reporting
from nanotron_fast.errors import ConfigError


def check(
    path: str, *, logits: bool, choices: VerifyChoices, workers: int | None, is_quiet: bool
) -> ManifestCheck:
    """Hashes the tensors of a checkpoint, with a bar. Raises ConfigError, CheckpointError."""
    given = [spelled(name) for name, value in choices.items() if value]
    if logits or given:
        option = "--logits" if logits else given[0]
        raise ConfigError(f"{option}: it has no meaning without a second checkpoint")
    progress = reporting.Progress(is_quiet=is_quiet)
    with progress.running("hashing") as on_progress:
        return check_manifest(
            path, workers=workers, on_plan=progress.expect, on_progress=on_progress
        )
