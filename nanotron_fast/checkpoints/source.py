"""What a user names as a checkpoint: a directory, a directory of training steps, or a Hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.partial import between
from nanotron_fast.checkpoints.remote.mirror import mirror, mirror_of
from nanotron_fast.checkpoints.remote.reason import reason
from nanotron_fast.checkpoints.remote.urls import as_path, is_url, on_disk
from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.dcp import is_dcp_checkpoint
from nanotron_fast.formats.hints import hint
from nanotron_fast.formats.huggingface import companions
from nanotron_fast.formats.huggingface.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    HfCheckpoint,
    is_hf_checkpoint,
    read_hf,
)
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron.checkpoint import (
    NanotronCheckpoint,
    is_nanotron_checkpoint,
    read_nanotron,
    resolve_latest,
)
from nanotron_fast.formats.nanotron.side_file import NAME as SIDE_FILE

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Weights in the original authors' own layout.
_CONSOLIDATED = "consolidated*"


def resolve(source: str | Path, *, takes_urls: bool = False) -> Path:
    """The directory that a source names, fetched from the Hub where it is an id.

    With `takes_urls` it may be a mirror of what lies in a store: see `checkpoints.remote`.
    Raises CheckpointError; ConfigError for a URL that is not taken or cannot be reached, OSError.
    """
    source = as_path(source, "the checkpoint")
    if takes_urls and is_url(source):
        return mirror(str(source))
    path = on_disk(source, "the checkpoint")
    if path.is_dir():
        return resolve_latest(path)
    if path.exists():
        raise CheckpointError(
            f"{source}: not a directory; name the one that holds the checkpoint, such as "
            f"{path.parent}"
        )
    _check_not_between(path)
    text = str(source)
    if not isinstance(source, str) or not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"{source}: no such directory")
    return _fetch(text, [_CONSOLIDATED])


def _check_not_between(path: Path) -> None:
    """Raises CheckpointError where a checkpoint lies aside, since a run ended on its last step."""
    found = between(path)
    if found is not None:
        raise CheckpointError(f"{path}: no such directory: {found}")


def resolve_companions(
    source: str | Path, what: str = "the tokenizer", *, revision: str | None = None
) -> Path:
    """The directory whose tokenizer or configuration is wanted, and no weights.

    Args:
        what: is wanted, as a message begins.
        revision: of a Hub id: a branch, a tag or a commit; None for the newest.

    Raises CheckpointError, ConfigError.
    """
    source = as_path(source, what)
    if is_url(source):
        return mirror(str(source), with_tensors=False)
    path = Path(source)
    if path.is_dir():
        return resolve_latest(path)
    if path.exists():
        raise CheckpointError(f"{source}: not a directory")
    _check_not_between(path)
    if not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{source}: no such directory")
    return _fetch(str(source), ["*.safetensors", "*.index.json"], revision)


def _fetch(hub_id: str, ignored: list[str], revision: str | None = None) -> Path:
    """A model's files from the Hub, those in folders only where transformers asks for them."""
    ignored = [*companions.IGNORED_ON_HUB, *ignored]
    root = _download(hub_id, ignore_patterns=ignored, revision=revision)
    wanted = companions.wanted_from_hub(root, _config(root))
    # Of the same revision, whose name the folder has.
    return _download(hub_id, allow_patterns=wanted, revision=root.name)


def _config(root: Path) -> object:
    path = root / CONFIG
    return read_json_object(path) if path.is_file() else None


def _download(hub_id: str, **choices: Any) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, **choices))
    except Exception as error:  # the library's errors have no common base, nor do its clients'
        raise CheckpointError(
            f"{hub_id}: no such directory, and it cannot be had from the Hub: {reason(error)}"
        ) from error


def read(
    root: Path, *, like: Path | None = None, takes_part: bool = False
) -> HfCheckpoint | NanotronCheckpoint:
    """The checkpoint in a directory, from its headers. Raises CheckpointError, OSError.

    `like` has the configuration of a model in a folder of torch.distributed.checkpoint, which is
    read as one of Hugging Face's. `takes_part` is for `read_nanotron`.
    """
    try:
        return _read(root, like, takes_part=takes_part)
    except CheckpointError as error:
        found = between(root)
        if found is not None:
            raise CheckpointError(f"{error}; {found}") from error
        raise


def _read(root: Path, like: Path | None, *, takes_part: bool) -> HfCheckpoint | NanotronCheckpoint:
    if is_nanotron_checkpoint(root):
        return read_nanotron(root, takes_part=takes_part)
    # Whose .metadata is beside weights that transformers loads, is not asked.
    if is_dcp_checkpoint(root) and not any((root / name).is_file() for name in (SINGLE, INDEX)):
        if mirror_of(root) is not None:
            raise CheckpointError(
                f"{root}: a folder of torch.distributed.checkpoint is read from a disk alone: copy "
                "it to one"
            )
        from nanotron_fast.checkpoints.from_dcp import read_dcp_model

        return read_dcp_model(root, like)
    if is_hf_checkpoint(root):
        checkpoint = read_hf(root)
        if checkpoint.rivals and mirror_of(root) is not None:
            raise CheckpointError(
                f"{root}: {SINGLE} and the files of {INDEX} lie side by side, and whether they "
                "hold the same can only be told on a disk: copy them to one, or leave one out"
            )
        return checkpoint
    found = hint(root)
    if found is not None:
        raise CheckpointError(f"{root}: {found}")
    if (root / "config.yaml").is_file() or (root / "latest.txt").is_file():
        raise CheckpointError(f"{root}: no model_config.json beside Nanotron's other files")
    raise CheckpointError(
        f"{root}: neither a Hugging Face checkpoint (config.json) nor a Nanotron one "
        "(model_config.json and model/), nor one of torch.distributed.checkpoint (.metadata)"
    )


def has_configuration(root: Path) -> bool:
    """Whether a published model's configuration lies in a directory."""
    return (root / CONFIG).is_file() or (root / SIDE_FILE).is_file()


def tensor_names(checkpoint: HfCheckpoint | NanotronCheckpoint) -> list[str]:
    """Of the tensors in a checkpoint, or of Nanotron's parameters."""
    if isinstance(checkpoint, HfCheckpoint):
        return list(checkpoint.tensors)
    return list(checkpoint.params)
