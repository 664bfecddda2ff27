"""The small files that go beside the weights: from the source, or from where the user says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.options import Options
from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint
from nanotron_fast.formats.huggingface.companions import Companions, companions
from nanotron_fast.formats.manifest import NAME as MANIFEST
from nanotron_fast.formats.nanotron import checkpoint as nanotron
from nanotron_fast.formats.nanotron import side_file
from nanotron_fast.formats.nanotron.checkpoint import NanotronCheckpoint
from nanotron_fast.formats.yaml_file import read_yaml

# What a Nanotron checkpoint has of its own: the conversion reads them.
_NANOTRON = (
    nanotron.MODEL_CONFIG,
    nanotron.METADATA,
    nanotron.CONFIG_YAML,
    nanotron.WEIGHTS,
    side_file.NAME,
    MANIFEST,
)
# Letters of a name that a warning repeats.
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Beside:
    """Files to copy, by their paths in the destination, and what is not copied."""

    copies: dict[str, Path]
    left_behind: tuple[str, ...]
    has_tokenizer: bool
    warnings: tuple[str, ...] = ()


def beside_published(source: HfCheckpoint, options: Options) -> Beside:
    """For a conversion of a published model. Raises CheckpointError, OSError."""
    found = companions(source.root, source.config, used=source.files)
    return _beside(source.root, found, source.config, options)


def beside_hf(source: NanotronCheckpoint, config: object, options: Options) -> Beside:
    """For a conversion from Nanotron. `config` is the source's config.json, where it is known.

    Raises CheckpointError, OSError.
    """
    found = companions(source.root, config, used=_NANOTRON)
    return _beside(source.root, found, config, options, looks_in_training=True)


def beside_resharded(source: NanotronCheckpoint, options: Options) -> Beside:
    """For a Nanotron checkpoint at another topology. Raises CheckpointError, OSError."""
    found = companions(source.root, used=_NANOTRON)
    return _beside(source.root, found, None, options)


def _beside(
    root: Path,
    found: Companions,
    config: object,
    options: Options,
    *,
    looks_in_training: bool = False,
) -> Beside:
    """What was found beside the source, in so far as the options name nothing else."""
    tokenizer, others = found.tokenizer, found.others
    warnings: list[str] = []
    if options.like is not None:
        like = companions(options.like, config)
        tokenizer = like.tokenizer or tokenizer
        others = {**others, **like.others}
    if options.tokenizer is not None:
        tokenizer = _tokenizer_of(options.tokenizer)
    if not tokenizer and looks_in_training:
        tokenizer, warning = _tokenizer_of_training(root, options.like)
        if warning:
            warnings.append(warning)
    copies = {**others, **tokenizer}
    warnings += _broken(root, found, copies)
    return Beside(copies, found.left, bool(tokenizer), tuple(warnings))


def _broken(root: Path, found: Companions, copies: Mapping[str, Path]) -> tuple[str, ...]:
    """A warning for each link to nothing in whose place nothing else is written."""
    return tuple(
        f"{root / name} is a link to {target}, where nothing is to be read: it is left behind. "
        "Of a model from the Hub, download the file again"
        for name, target in found.broken.items()
        if name not in copies
    )


def _tokenizer_of(root: Path) -> dict[str, Path]:
    tokenizer = companions(root).tokenizer
    if not tokenizer:
        raise CheckpointError(f"{root}: there is no tokenizer in it")
    return tokenizer


def _tokenizer_of_training(root: Path, like: Path | None) -> tuple[dict[str, Path], str | None]:
    """The tokenizer that a training configuration names, or what to do without one."""
    document, problem = training_document(root)
    name = _at(document, "tokenizer", "tokenizer_name_or_path")
    # Unlike Path.is_dir, it takes a name that no file system could hold for no folder.
    if isinstance(name, str) and name and os.path.isdir(name):
        found: Companions = companions(Path(name))
        if found.tokenizer:
            return found.tokenizer, None
        problem = f"{nanotron.CONFIG_YAML} names {name}, which has none"
    elif isinstance(name, str) and name:
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
        problem = f"{nanotron.CONFIG_YAML} names {shown}, which is no folder here"
    looked_in = f"{root} and {like}" if like else f"{root}"
    because = f", and {problem}" if problem else ""
    return {}, (
        f"no tokenizer is written: none lies in {looked_in}{because}. "
        "Give it with --tokenizer DIR_OR_ID"
    )


def training_document(root: Path) -> tuple[object, str | None]:
    """The training configuration of a checkpoint, and what is wrong with it."""
    path = root / nanotron.CONFIG_YAML
    if not path.is_file():
        return None, None
    try:
        return read_yaml(path), None
    except (CheckpointError, OSError) as error:
        return None, f"{nanotron.CONFIG_YAML} cannot be read ({error})"


def original_of_training(root: Path) -> Path | None:
    """The checkpoint of ours that a training started from, where it is still there."""
    document, _ = training_document(root)
    path = _at(document, "model", "init_method", "path")
    if not isinstance(path, str) or not path:
        return None
    return Path(path) if os.path.isfile(os.path.join(path, side_file.NAME)) else None


def _at(document: Any, *keys: str) -> object:
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document
