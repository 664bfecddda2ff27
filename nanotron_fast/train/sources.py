"""What data_stages name, found before anything is read: files, token files, datasets."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nanotron_fast.checkpoints.remote.urls import on_disk
from nanotron_fast.errors import DataError, NanotronFastError, one_line
from nanotron_fast.extras import require
from nanotron_fast.train.config.data import Dataset, Nanoset

if TYPE_CHECKING:
    from nanotron_fast.train.config.data import DataStage
    from nanotron_fast.train.config.training_config import TrainingConfig

SUFFIXES = (".txt", ".jsonl")
NOT_THERE = "there is no such file or folder"
# In a folder, these are data that `datasets` reads.
_DATASET_SUFFIXES = (".parquet", ".arrow", ".csv", ".json", ".gz", ".zst")

# As hf_dataset_or_datasets says it.
Names = str | Sequence[str] | Mapping[str, float]


def names_of(name: Names) -> list[str]:
    """Of one source or several."""
    return [name] if isinstance(name, str) else list(name)


def find(name: Names) -> tuple[Path, ...] | None:
    """The text and JSONL files that names stand for; None where `datasets` is to look for them.

    Raises DataError, and MissingPackageError where there is no `datasets` to do so.
    """
    names = names_of(name)
    if not names:
        raise DataError("it is empty: name a file, a folder or a dataset")
    found = [find_files(each) for each in names]
    files = [each for each in found if each is not None]
    if files and (len(files) != len(found) or isinstance(name, Mapping)):
        raise DataError(
            f"{', '.join(names)}: files are joined, and cannot be mixed with datasets or by "
            "weight; `nanotron-fast tokenize` makes Nanosets of them, which can"
        )
    if files:
        return tuple(path for paths in files for path in paths)
    for each in names:
        what = "as a dataset" if Path(each).exists() else f"{NOT_THERE}; as a dataset of the Hub"
        require("train", f"{each}: {what} it", ["datasets"])
    return None


def find_files(name: str | Path) -> tuple[Path, ...] | None:
    """The text and JSONL files of a file, a folder or a glob, sorted; None for no such thing.

    Raises DataError where a name can be nothing else, and nothing is there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: it is neither .txt nor .jsonl")
        return (path,)
    if path.is_dir():
        found = [Path(root, each) for root, _, names in os.walk(path) for each in names]
        visible = [each for each in found if not each.name.startswith(".")]
        if any(each.suffix in _DATASET_SUFFIXES for each in visible):
            return None
        texts = sorted(each for each in visible if each.suffix in SUFFIXES)
        if not texts:
            raise DataError(f"{path}: there is no .txt or .jsonl file in it")
        return tuple(texts)
    if glob.has_magic(str(path)):
        matches = (Path(each) for each in glob.glob(str(path), recursive=True))
        texts = sorted(each for each in matches if each.suffix in SUFFIXES and each.is_file())
        if not texts:
            raise DataError(f"{name}: it matches no .txt or .jsonl file")
        return tuple(texts)
    on_disk(name, "the text")
    is_path = str(name).startswith((".", "~", "/")) or path.suffix in SUFFIXES
    if is_path or str(name).count("/") > 1:
        raise DataError(f"{name}: {NOT_THERE}")
    return None


def find_tokens(folder: str | Path, copies: str | Path | None = None) -> tuple[Path, list[str]]:
    """A Nanoset's folder, or where it is not here the one with copies; and its token files, sorted.

    Raises DataError.
    """
    root = Path(folder)
    if str(folder).startswith("s3://") and copies is None:
        raise DataError(f"{folder}: copy it to a local disk, or name a copy in dataset_read_path")
    if copies is not None and not root.is_dir():
        root = Path(copies)
    if not root.is_dir():
        there = "it is a file; name its folder" if root.exists() else "there is no such folder"
        raise DataError(f"{root}: {there}")
    found = [path.name for path in root.glob("*.ds")]
    if not found:
        raise DataError(
            f"{root}: there is no .ds file in it; `nanotron-fast tokenize` makes them from text"
        )
    return root, sorted(found)


@contextmanager
def named(config: TrainingConfig, stage: DataStage) -> Iterator[None]:
    """Errors about a stage's data begin with the key that names them. Raises DataError.

    The stage goes by its name: the configuration has sorted the stages, and lost their indices.
    """
    key = "dataset_folder" if isinstance(stage.data.dataset, Nanoset) else "hf_dataset_or_datasets"
    try:
        yield
    except NanotronFastError as error:
        place = config.place.at("data_stages")
        raise DataError(f"{place} ({stage.name}): {key}: {error}") from error


def missing(config: TrainingConfig) -> Iterator[str]:
    """What the data stages name and is not here, each with its key. Nothing is read."""
    for stage in config.data_stages:
        try:
            with named(config, stage):
                try:
                    _look_for(stage.data.dataset)
                except OSError as error:  # it may not be looked at
                    raise DataError(one_line(error)) from error
        except DataError as error:
            yield str(error)


def _look_for(dataset: Dataset | None) -> None:
    if isinstance(dataset, Nanoset):
        copies = dataset.dataset_read_path or (None,) * len(dataset.dataset_folder)
        for folder, copy in zip(dataset.dataset_folder, copies, strict=True):
            find_tokens(folder, copy)
    elif dataset is not None:
        find(dataset.hf_dataset_or_datasets)
