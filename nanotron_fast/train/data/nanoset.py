"""Nanosets: folders of tokens on disk, read where they lie.

`x.ds` holds the tokens of documents one after another, as uint16 or uint32; `x.ds.index` the end of
each document in tokens, as uint64; `x.ds.metadata` is text, its first line "tokenizer|bytes a
token". All are little-endian. This is what datatrove's DocumentTokenizer and `nanotron-fast
tokenize` write.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.samples import Array, Sample, positions_from_starts
from nanotron_fast.train.sources import find_tokens

TOKEN_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
INDEX_DTYPE: np.dtype[Any] = np.dtype("<u8")

# An open map holds a file descriptor, of which a process may have few.
_MAPS_KEPT = 128


@lru_cache(maxsize=_MAPS_KEPT)
def mapped(path: str, dtype: np.dtype[Any]) -> Array:
    """A file's numbers, read as they are touched. Raises DataError."""
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: it cannot be read: {reason}") from error


@dataclass(frozen=True, slots=True)
class TokenFile:
    """Samples of sequence + 1 tokens that lie one after another in a file, and do not overlap.

    Args:
        path: of the .ds file.
        token_size: in bytes.
        sequence_length: of a sample, less the token that comes after.
        num_samples: in the file.
        eos_token_id: a document begins after each; None to go by the index.
        has_positions: give each token's place in its document.
    """

    path: str
    token_size: int
    sequence_length: int
    num_samples: int
    eos_token_id: int | None
    has_positions: bool

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int, /) -> Sample:
        length = self.sequence_length + 1
        first = index % self.num_samples * length
        dtype = TOKEN_DTYPES[self.token_size]
        tokens = mapped(self.path, dtype)[first : first + length].astype(np.int64)
        if not self.has_positions:
            return Sample(tokens)
        if self.eos_token_id is not None:
            starts = np.flatnonzero(tokens[:-1] == self.eos_token_id) + 1
        else:
            starts = starts_within(mapped(f"{self.path}.index", INDEX_DTYPE), first, length)
        return Sample(tokens, positions_from_starts(starts, length))


def starts_within(ends: Array, first: int, length: int) -> Array:
    """Where documents begin within some tokens, but for the first of these.

    Args:
        ends: uint64, of each document, rising.
        first: of the tokens.
        length: how many tokens.
    """
    bounds = np.array([first, first + length - 1], dtype=INDEX_DTYPE)
    begin, end = np.searchsorted(ends, bounds, side="right")
    return (ends[begin:end] - bounds[0]).astype(np.int64)


class TokenFolder:
    """The samples of a folder's .ds files: file after file, sorted by name or shuffled."""

    def __init__(
        self,
        folder: str | Path,
        sequence_length: int,
        *,
        token_size: int | None = None,
        has_positions: bool = False,
        eos_token_id: int | None = None,
        shuffle_seed: int | None = None,
        max_tokens: int | None = None,
        read_path: str | Path | None = None,
    ) -> None:
        """Opens a folder.

        Args:
            folder: with .ds files.
            sequence_length: of a sample, less the token that comes after.
            token_size: in bytes; None to take it from the metadata.
            has_positions: give each token's place in its document.
            eos_token_id: a document begins after each; None to go by the .ds.index files.
            shuffle_seed: permutes the files; None for their order by name.
            max_tokens: use so many of them, counted before the files are shuffled.
            read_path: a folder with copies of some files, which are read instead.

        Raises:
            DataError: the folder, its metadata or an index is missing or malformed.
        """
        self.folder = str(folder)
        # Files of these names may have been others before.
        mapped.cache_clear()
        copies = Path(read_path) if read_path is not None else None
        root, names = find_tokens(folder, copies)
        self.token_size = _token_size(root, token_size)
        self.sequence_length = sequence_length
        files, remaining = [], max_tokens
        for name in names:
            path = root / name
            if copies is not None and (copies / name).is_file():
                path = copies / name
            file = self._file(path, remaining, has_positions, eos_token_id)
            files.append(file)
            if remaining is not None:
                remaining -= len(file) * (sequence_length + 1)
                if remaining <= 0:
                    break
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(range(len(files)))
            files = [files[i] for i in order]
        self._files: Sequence[TokenFile] = files
        self._begins = [0, *accumulate(map(len, files))]
        if not len(self):
            raise DataError(
                f"{self.folder}: its {len(files)} .ds files have no {sequence_length + 1} tokens "
                "that lie together, which a sample needs"
            )

    def _file(
        self, path: Path, max_tokens: int | None, has_positions: bool, eos_token_id: int | None
    ) -> TokenFile:
        num_bytes = path.stat().st_size
        num_tokens, rest = divmod(num_bytes, self.token_size)
        if rest:
            raise DataError(
                f"{path}: its {num_bytes:,} bytes are no whole number of tokens of "
                f"{self.token_size} bytes"
            )
        if has_positions and eos_token_id is None:
            _check_index(path, num_tokens)
        usable = num_tokens if max_tokens is None else min(num_tokens, max_tokens)
        return TokenFile(
            str(path),
            self.token_size,
            self.sequence_length,
            usable // (self.sequence_length + 1),
            eos_token_id,
            has_positions,
        )

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: int, /) -> Sample:
        file, within = self._find(index)
        return file[within]

    def place(self, index: int) -> str:
        """Where a sample lies, in words."""
        file, within = self._find(index)
        return f"{file.path}, from token {within * (self.sequence_length + 1)} on"

    def _find(self, index: int) -> tuple[TokenFile, int]:
        within = index % len(self)
        number = bisect_right(self._begins, within) - 1
        return self._files[number], within - self._begins[number]


def _token_size(folder: Path, given: int | None) -> int:
    """Bytes a token, as the metadata say it and the configuration does not deny."""
    size = given
    for path in sorted(folder.glob("*.metadata")):
        _, bar, last = path.read_text(errors="replace").partition("\n")[0].rpartition("|")
        if not bar:
            continue
        if not last.strip().isdigit() or int(last) not in TOKEN_DTYPES:
            raise DataError(f"{path}: tokens of {last.strip()!r} bytes; there are 2 and 4")
        if size is not None and size != int(last):
            raise DataError(
                f"{path}: tokens of {int(last)} bytes, and "
                f"{'token_size_in_bytes is' if given is not None else 'others beside it have'} "
                f"{size}"
            )
        size = int(last)
    if size is None:
        raise DataError(
            f"{folder}: no .metadata file in it says how many bytes a token has; "
            "give token_size_in_bytes, 2 or 4"
        )
    return size


def _check_index(path: Path, num_tokens: int) -> None:
    """That a file's index is there, and goes as far as the file does."""
    index = Path(f"{path}.index")
    if not index.is_file():
        raise DataError(
            f"{index}: there is no such file, and it says where documents begin; "
            "return_positions: false does without"
        )
    num_bytes = index.stat().st_size
    last = 0
    if num_bytes and num_bytes % INDEX_DTYPE.itemsize == 0:
        with index.open("rb") as stream:
            stream.seek(-INDEX_DTYPE.itemsize, os.SEEK_END)
            last = int.from_bytes(stream.read(), "little")
    if last != num_tokens:
        raise DataError(f"{index}: it ends at token {last:,}, and {path.name} at {num_tokens:,}")
