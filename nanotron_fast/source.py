"""What a user names as a checkpoint: a directory, a directory of training steps, or a Hub id."""

from __future__ import annotations

import re
from pathlib import Path

from nanotron_fast.errors import CheckpointError
from nanotron_fast.layouts import tokenizer
from nanotron_fast.layouts.hf import HfCheckpoint, is_hf_checkpoint, read_hf
from nanotron_fast.layouts.nanotron import (
    NanotronCheckpoint,
    is_nanotron_checkpoint,
    read_nanotron,
    resolve_latest,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Weights, configs and tokenizers; not the folders beside them (original/, onnx/).
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["*/*", "consolidated*"]


def resolve(source: str | Path) -> Path:
    """The directory that a source names, fetched from the Hub where it is an id.

    Raises CheckpointError.
    """
    path = Path(source)
    if path.is_dir():
        return resolve_latest(path)
    if path.exists():
        raise CheckpointError(f"{source}: not a directory; name the one that holds the checkpoint")
    text = str(source)
    if not isinstance(source, str) or not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"{source}: no such directory")
    return _download(text, _HUB_FILES)


def resolve_tokenizer(source: str | Path) -> Path:
    """The directory with the tokenizer that a directory or a Hub id names.

    Raises CheckpointError.
    """
    if Path(source).is_dir():
        return Path(source)
    if not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{source}: no such directory")
    return _download(str(source), list(tokenizer.NAMES))


def _download(hub_id: str, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=patterns, ignore_patterns=_HUB_IGNORED
            )
        )
    except Exception as error:  # the library's errors have no common base, nor do its clients'
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{hub_id}: no such directory, and it cannot be had from the Hub: {first_line}"
        ) from error


def read(root: Path) -> HfCheckpoint | NanotronCheckpoint:
    """The checkpoint in a directory, from its headers. Raises CheckpointError, OSError."""
    if is_nanotron_checkpoint(root):
        return read_nanotron(root)
    if is_hf_checkpoint(root):
        return read_hf(root)
    if (root / "config.yaml").is_file() or (root / "latest.txt").is_file():
        raise CheckpointError(f"{root}: no model_config.json beside Nanotron's other files")
    raise CheckpointError(
        f"{root}: neither a Hugging Face checkpoint (config.json) nor a Nanotron one "
        "(model_config.json and model/)"
    )
