"""Where text comes from: files, or what `datasets` loads, cut into blocks of work.

One process reads, which is quick, and any number of them make tokens of the blocks. The blocks, and
so the tokens, are the same for any number of processes.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanotron_fast.checkpoints.remote.reason import reason
from nanotron_fast.errors import DataError
from nanotron_fast.formats.lfs import HINT, is_pointer
from nanotron_fast.train.data.tokenizer import MAX_CHARACTERS, split
from nanotron_fast.train.sources import DATA_SUFFIXES, NOT_THERE, find, find_tables, names_of

_BLOCK_BYTES = 2**20
# As `datasets` hands them to Nanotron, which joins the texts of one such group.
_ROWS_IN_GROUP = 1000
# Those that conversations are made of.
_CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion", "tools")


@dataclass(frozen=True, slots=True)
class Rows:
    """Whole documents: texts, or rows with several columns.

    Args:
        rows: the documents.
        place: where they come from, in words.
        num_bytes: of them, more or less, for a progress bar.
        first_row: the number of the first of them there, from 0.
        ends_group: the texts after these are not joined to them.
    """

    rows: Sequence[Any]
    place: str
    num_bytes: int
    first_row: int = 0
    ends_group: bool = False

    def place_of(self, number: int) -> str:
        """Where one of them comes from, in words."""
        return f"{self.place}, row {self.first_row + number:,} (from 0)"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one long document."""

    text: str
    is_first: bool
    is_last: bool
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of a JSONL file, each a document.

    Args:
        data: whole lines.
        path: of the file.
        first_line: its number, from 1.
        column: the key of each object that holds the text; None to take the object.
    """

    data: bytes
    path: str
    first_line: int
    column: str | None

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return len(self.data)


Block = Rows | Piece | Lines


class Source(Protocol):
    """Documents in an order of their own."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of all blocks together; 0 where that is not known."""
        ...

    @property
    def is_grouped(self) -> bool:
        """Whether texts are joined within groups alone, as Nanotron joins those of `datasets`."""
        ...

    def identity(self) -> str:
        """A digest that changes whenever the documents, or their groups, do."""
        ...

    def blocks(self) -> Iterator[Block]:
        """The documents. Raises DataError."""
        ...


@dataclass(frozen=True, slots=True)
class Files:
    """Text files, each of which is a document, and JSONL files, each line of which is one.

    Args:
        name: what they were found by.
        paths: of the files, in order.
        column: the key of the text in JSONL; None to take whole objects, of JSONL files alone.
    """

    name: str
    paths: tuple[Path, ...]
    column: str | None

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @property
    def is_grouped(self) -> bool:
        return False

    def identity(self) -> str:
        digest = hashlib.sha256(f"files\0{self.column}".encode())
        for path in self.paths:
            status = path.stat()
            absolute = os.path.abspath(path)
            digest.update(f"\0{absolute}\0{status.st_size}\0{status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def blocks(self) -> Iterator[Block]:
        texts: list[str] = []
        size = 0
        for path in self.paths:
            _check_downloaded(path)
            if path.suffix == ".jsonl":
                if texts:
                    yield Rows(texts, self.name, size)
                    texts, size = [], 0
                yield from _lines(path, self.column)
                continue
            if self.column is None:
                raise DataError(f"{path}: conversations are read from .jsonl files")
            pieces = _pieces(path)
            first, second = next(pieces), next(pieces, None)
            if second is None:
                texts.append(first)
                size += path.stat().st_size
                if size >= _BLOCK_BYTES:
                    yield Rows(texts, self.name, size)
                    texts, size = [], 0
                continue
            if texts:
                yield Rows(texts, self.name, size)
                texts, size = [], 0
            yield from _long_document(first, second, pieces)
        if texts:
            yield Rows(texts, self.name, size)


def _check_downloaded(path: Path) -> None:
    """Raises DataError for what stands in a clone for a file."""
    with path.open("rb") as stream:
        if is_pointer(stream.read(64)):
            raise DataError(f"{path}: {HINT}")


def _lines(path: Path, column: str | None) -> Iterator[Block]:
    """A JSONL file in blocks of whole lines."""
    line = 1
    with path.open("rb") as stream:
        while data := stream.read(_BLOCK_BYTES):
            if not data.endswith(b"\n"):
                data += stream.readline()
            yield Lines(data, str(path), line, column)
            line += data.count(b"\n")


def _pieces(path: Path) -> Iterator[str]:
    """A text file in pieces that fit a tokenizer; at least one. Raises DataError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, offset, is_done, is_start = "", 0, False, True
    with path.open("rb") as stream:
        while not is_done:
            while len(text) <= MAX_CHARACTERS and not is_done:
                data = stream.read(_BLOCK_BYTES)
                waiting = len(decoder.getstate()[0])
                try:
                    text += decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    place = offset - waiting + error.start
                    byte = error.object[error.start]
                    raise DataError(
                        f"{path}: it is not UTF-8: byte {place:,} is 0x{byte:02x}"
                    ) from error
                offset += len(data)
                is_done = not data
                if is_start and text:
                    # The mark that some editors put before everything.
                    text, is_start = text.removeprefix("\ufeff"), False
            *whole, text = split(text)
            yield from whole
    yield text


def _long_document(first: str, second: str, rest: Iterator[str]) -> Iterator[Block]:
    """The pieces of one document."""
    yield Piece(first, True, False, len(first.encode()))
    text = second
    for following in rest:
        yield Piece(text, False, False, len(text.encode()))
        text = following
    yield Piece(text, False, True, len(text.encode()))


@dataclass(frozen=True, slots=True)
class DatasetRows:
    """The rows of a `datasets.Dataset`.

    Args:
        name: what it was loaded by.
        dataset: the Dataset.
        column: of the text; None to take whole rows.
        processes: among which Nanotron would share the rows, which decides where groups of texts
            end.
    """

    name: str
    dataset: Any
    column: str | None
    processes: int = 1

    def __post_init__(self) -> None:
        check_column(self.name, self.dataset, self.column)

    @property
    def num_bytes(self) -> int:
        table = self.dataset.data
        return round(table.nbytes * len(self.dataset) / max(table.num_rows, 1))

    @property
    def is_grouped(self) -> bool:
        return self.column is not None

    def identity(self) -> str:
        words = (
            "datasets",
            self.dataset._fingerprint,
            str(len(self.dataset)),
            str(self.column),
            str(self.processes),
        )
        return hashlib.sha256("\0".join(words).encode()).hexdigest()

    def blocks(self) -> Iterator[Block]:
        num_rows = len(self.dataset)
        a_row = self.num_bytes / max(num_rows, 1)
        for begin, end in row_groups(num_rows, self.processes):
            rows = self.dataset[begin:end]
            if self.column is not None:
                values: Sequence[Any] = rows[self.column]
            else:
                keys = list(rows)
                values = [
                    dict(zip(keys, row, strict=True)) for row in zip(*rows.values(), strict=True)
                ]
            yield Rows(values, self.name, round(a_row * (end - begin)), begin, ends_group=True)


def check_column(name: str, dataset: Any, column: str | None) -> None:
    """Raises DataError where a dataset has no such column."""
    if column is not None and column not in dataset.column_names:
        raise DataError(
            f"{name}: it has no column {column!r}, but {', '.join(dataset.column_names)}; name one "
            "of these in text_column_name"
        )


def row_groups(num_rows: int, processes: int) -> Iterator[tuple[int, int]]:
    """First row, and the one after the last, of each group that Nanotron joins the texts of.

    `Dataset.map` gives each process a run of rows, of which the first ones get one more where they
    do not come out even, and each process takes a thousand at a time.
    """
    processes = max(1, min(processes, num_rows))
    share, rest = divmod(num_rows, processes)
    begin = 0
    for process in range(processes):
        end = begin + share + (process < rest)
        for first in range(begin, end, _ROWS_IN_GROUP):
            yield first, min(first + _ROWS_IN_GROUP, end)
        begin = end


def open_source(
    name: str | Sequence[str] | Mapping[str, float],
    *,
    column: str | None = "text",
    split: str = "train",
    config_name: str | None = None,
    processes: int = 1,
) -> Source:
    """Documents by name.

    Args:
        name: a file, folder or glob of .txt or .jsonl, or of what `datasets` reads; what
            `datasets.load_dataset` takes; several of these, all text or none, one after another; or
            datasets with the part of each to take, which are shuffled together as Nanotron does it.
        column: that holds the text; None to take whole rows, as conversations are.
        split: of a dataset; of files there is "train" alone, which is all of them.
        config_name: of a dataset.
        processes: see DatasetRows.

    Raises DataError, MissingPackageError.
    """
    names = names_of(name)
    files, shown = find(name), ", ".join(names)
    if files is not None:
        asked = config_name if split == "train" else split
        if asked is not None:
            raise DataError(
                f"{shown}: these are files, and {asked!r} is of a dataset: files have neither "
                "splits nor configurations"
            )
        return Files(shown, files, column)
    loaded = []
    for each in names:
        dataset = _load(each, split, config_name)
        check_column(each, dataset, column)
        # Of the others, two datasets may have one name for what does not go together.
        wanted = _CHAT_COLUMNS if column is None else (column,)
        found = [each for each in wanted if each in dataset.column_names]
        loaded.append(dataset.select_columns(found) if found else dataset)
    fractions = list(name.values()) if isinstance(name, Mapping) else None
    return DatasetRows(shown, _mixed(names, loaded, fractions), column, processes)


def _load(name: str, split: str, config_name: str | None) -> Any:
    import datasets

    path = Path(os.path.abspath(os.path.expanduser(name)))
    tables = [os.path.abspath(each) for each in find_tables(name)]
    is_saved = any((path / each).is_file() for each in ("state.json", "dataset_dict.json"))
    if config_name is not None and (tables or is_saved):
        what = "they are files, and have" if tables else "it was saved to disk, and has"
        raise DataError(f"{name}: {what} no configuration {config_name!r}")
    try:
        if is_saved:
            return _saved(name, datasets.load_from_disk(str(path)), split)
        if tables:
            # Each of the names is a glob for `datasets`.
            names = [glob.escape(each) for each in tables]
            folder = os.path.dirname(tables[0])
            return datasets.load_dataset(folder, data_files=names, split=split)
        # A folder's whole path is no name of a format, nor of a dataset of the Hub.
        return datasets.load_dataset(str(path) if path.exists() else name, config_name, split=split)
    except DataError:
        raise
    # What a loading script, a builder or the Hub raises has no common type.
    except Exception as error:
        for each in map(Path, tables or path.rglob("*.*")):
            if each.suffix in DATA_SUFFIXES and each.is_file() and os.access(each, os.R_OK):
                _check_downloaded(each)
        local = "" if tables or path.exists() else f"{NOT_THERE}, and "
        raise DataError(
            f"{name}: {local}`datasets` cannot load its split {split!r}: {_cause(error)}"
        ) from error


def _saved(name: str, loaded: Any, split: str) -> Any:
    """A split of what was saved to disk: a mapping of splits, or one dataset. Raises DataError."""
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise DataError(f"{name}: it has no split {split!r}, but {', '.join(loaded)}")
        return loaded[split]
    own = "train" if loaded.split is None else str(loaded.split)
    if split not in (own, "train"):
        raise DataError(
            f"{name}: it was saved to disk as one dataset, and has no split {split!r}: all of it "
            f"is {own!r}"
        )
    return loaded


def _cause(error: BaseException) -> str:
    """What went wrong at first: `datasets` says of some errors only that there was one."""
    while error.__cause__ is not None and type(error).__name__.startswith("DatasetGeneration"):
        error = error.__cause__
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    # Between them are whole schemas.
    return f"{first} ... {others[-1]}" if type(error).__name__ == "CastError" else reason(error)


def _mixed(names: Sequence[str], loaded: list[Any], fractions: Sequence[float] | None) -> Any:
    """One dataset of several. Raises DataError."""
    import datasets

    for number, fraction in enumerate(fractions or ()):
        if not 0 <= fraction <= 1:
            raise DataError(f"{names[number]}: a part of {fraction} of it; parts are from 0 to 1")
        whole = loaded[number]
        loaded[number] = whole.select(range(int(fraction * len(whole))))
    if fractions is None and len(loaded) == 1:
        return loaded[0]
    try:
        joined = datasets.concatenate_datasets(loaded)
    except ValueError as error:
        raise DataError(f"{', '.join(names)}: they cannot be joined: {reason(error)}") from error
    # The seed is Nanotron's own, whatever that of the run.
    return joined if fractions is None else joined.shuffle(seed=42)
