"""What data_stages name, found before anything is read: files, token files, datasets."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nanotron_fast.checkpoints.remote.urls import on_disk
from nanotron_fast.errors import DataError, NanotronFastError, one_line
from nanotron_fast.extras import listed, require
from nanotron_fast.train.config.data import Dataset, Nanoset

if TYPE_CHECKING:
    from nanotron_fast.train.config.data import DataStage
    from nanotron_fast.train.config.training_config import TrainingConfig

SUFFIXES = (".txt", ".jsonl")
NOT_THERE = "there is no such file or folder"
# These are read by `datasets`.
_DATASET_SUFFIXES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".gz", ".zst", ".bz2", ".xz")
DATA_SUFFIXES = (*SUFFIXES, *_DATASET_SUFFIXES)
# Of each kind `datasets` reads all, whatever they are packed with.
_KINDS = {kind: kind for kind in (".parquet", ".arrow", ".csv", ".tsv", ".json", ".txt")} | {
    ".jsonl": ".json"
}
_ABOUT_DATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")

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
        is_there = glob.has_magic(each) or os.path.exists(os.path.expanduser(each))
        what = "as a dataset" if is_there else f"{NOT_THERE}; as a dataset of the Hub"
        require("train", f"{each}: {what} it", ["datasets"])
    return None


def find_files(name: str | Path) -> tuple[Path, ...] | None:
    """The text and JSONL files of a file, a folder or a glob, sorted; None for no such thing.

    None as well where they are files that `datasets` reads. Raises DataError where a name can be
    nothing else and nothing is there, and where a folder may not be read: what is in it would be
    left out.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        if path.suffix in _DATASET_SUFFIXES:
            return None
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: it is neither .txt nor .jsonl, nor does `datasets` read it")
        return (path,)
    if path.is_dir():
        below = _below(path)
        # What is packed, of nobody knows what, is not read by `datasets` either.
        if any(each.suffix in _DATASET_SUFFIXES and _kind(each) for each in below):
            _check_links(path, below)
            _check_kinds(path, below)
            return None
        texts = sorted(each for each in below if each.suffix in SUFFIXES)
        if not texts:
            raise DataError(f"{path}: there is no .txt or .jsonl file in it")
        return tuple(texts)
    if glob.has_magic(str(path)):
        matches = _matching(path)
        texts = [each for each in matches if each.suffix in SUFFIXES]
        if len(texts) < len(matches) and texts:
            raise DataError(f"{name}: it matches {texts[0]}, and files that `datasets` reads")
        if not matches:
            raise DataError(f"{name}: it matches no .txt or .jsonl file")
        kinds = {_kind(each) or each.suffix for each in matches}
        if not texts and len(kinds) > 1:
            raise DataError(
                f"{name}: it matches {listed(sorted(kinds))} files, and `datasets` reads one kind "
                "at a time: name one"
            )
        return tuple(texts) or None
    on_disk(name, "the text")
    is_path = str(name).startswith((".", "~", "/")) or path.suffix in SUFFIXES
    if is_path or str(name).count("/") > 1:
        raise DataError(f"{name}: {NOT_THERE}")
    return None


def find_tables(name: str) -> tuple[Path, ...]:
    """What `datasets` is to read of a file or a glob; nothing for a folder, or no such thing."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return (path,)
    return tuple(_matching(path)) if glob.has_magic(name) and not path.is_dir() else ()


def _below(folder: Path) -> list[Path]:
    """The files in a folder and those within it, links to folders included, hidden ones not.

    Raises DataError.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    # Links come last: a file goes by its own name, whatever links to its folder are called.
    tops = [str(folder)]
    for top in tops:
        for root, folders, names in os.walk(top, onerror=_refuse):
            status = os.stat(root)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            tops += filter(os.path.islink, (os.path.join(root, each) for each in folders))
            found += [Path(root, each) for each in names if not each.startswith(".")]
    return found


def _check_links(folder: Path, below: list[Path]) -> None:
    """Raises DataError where files lie behind a link, into which `datasets` does not look."""
    for parent in sorted({each.parent for each in below}):
        within = [parent, *parent.parents]
        link = next((each for each in within[: within.index(folder)] if each.is_symlink()), None)
        if link is not None:
            raise DataError(
                f"{link}: it is a link to a folder, into which `datasets` does not look; name "
                "each folder in a list"
            )


def _kind(path: Path) -> str | None:
    """What a file is, whatever it is packed with; None for what is no data."""
    return next((_KINDS[each] for each in reversed(path.suffixes) if each in _KINDS), None)


def _check_kinds(folder: Path, below: list[Path]) -> None:
    """Raises DataError where `datasets` would read some files and pass by others.

    It reads the kind that there is most of, but where a README says which files are data. A few
    .txt or .json beside other files are no data: a licence, or numbers about the data.
    """
    if (folder / "README.md").is_file():
        return
    data, beside = Counter[str](), Counter[str]()
    for path in below:
        kind = _kind(path)
        if kind is not None and path.name not in _ABOUT_DATA:
            (beside if path.suffix in (".txt", ".json") else data)[kind] += 1
    kinds = set(data or beside)
    for most, number in data.most_common(1):
        # Of as many files of two kinds, every version of `datasets` reads .parquet.
        few = number + (most == ".parquet")
        kinds |= {kind for kind, count in beside.items() if count >= few}
    if len(kinds) > 1:
        raise DataError(
            f"{folder}: it has {listed(sorted(kinds))} files, of which `datasets` reads one kind "
            "alone: name a folder or a glob of those that are meant"
        )


def _matching(pattern: Path) -> list[Path]:
    """The files that a glob matches and that hold data, sorted. Raises DataError."""
    parts = pattern.parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    # glob itself passes by folders that it may not read.
    for number in range(first, len(parts) + (parts[-1] == "**")):
        for folder in glob.glob(f"{Path(*parts[:number])}/", recursive=True):
            try:
                os.scandir(folder).close()
            except OSError as error:
                _refuse(error)
    matches = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    return [each for each in matches if each.suffix in DATA_SUFFIXES and not each.is_dir()]


def _refuse(error: OSError) -> None:
    """Raises DataError: a folder may hold data, and cannot be listed."""
    folder = Path(error.filename)
    # Many a file system has one at its root, which only root may read and nobody's data are in.
    if folder.name == "lost+found" and os.path.ismount(folder.parent):
        return
    raise DataError(
        f"{folder}: it may not be read, and may hold data: {error.strerror}; make it readable, or "
        "name what is to be read"
    ) from error


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
    try:
        found = [name for name in os.listdir(root) if name.endswith(".ds")]
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}") from error
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
