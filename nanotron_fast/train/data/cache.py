"""Tokens of text, made once and kept on disk for every rank and every later run.

An entry is a folder that holds all tokens in one .ds file with its index, and about.json. Its name
is a digest of the documents, of the tokenizer and of how the two go together, so an entry that is
there is the right one. The rank that comes first makes it; the others of its machine wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanotron_fast.checkpoints.small_files import write_file
from nanotron_fast.errors import DataError
from nanotron_fast.train.data.encode import Recipe
from nanotron_fast.train.data.nanoset import INDEX_DTYPE, TOKEN_DTYPES, mapped
from nanotron_fast.train.data.samples import Array
from nanotron_fast.train.data.text import Source
from nanotron_fast.train.data.worker import encode
from nanotron_fast.train.data.writing import TokenWriter, locked, whole_folder

# Changes with whatever changes the tokens that are made of the same text.
_VERSION = "1"
_TOKENS = "tokens.ds"

# What is done and what there is to do, in bytes of text; 0 where that is not known.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """All documents of a source.

    Args:
        name: of the source.
        path: of the .ds file.
        token_size: in bytes.
        num_tokens: in all.
        num_documents: in all.
        group_ends: int64, where groups of joined texts end; None where all texts are joined.
    """

    name: str
    path: str
    token_size: int
    num_tokens: int
    num_documents: int
    group_ends: Array | None

    @property
    def tokens(self) -> Array:
        """Of all documents, mapped: uint16 or uint32."""
        return self._mapped("", TOKEN_DTYPES[self.token_size], self.num_tokens)

    @property
    def ends(self) -> Array:
        """The end of each document, mapped: uint64."""
        return self._mapped(".index", INDEX_DTYPE, self.num_documents)

    @property
    def is_learned(self) -> Array:
        """For each token, whether there is a loss of it, mapped: uint8. Of conversations alone."""
        return self._mapped(".learned", np.dtype(np.uint8), self.num_tokens)

    def _mapped(self, suffix: str, dtype: np.dtype[Any], size: int) -> Array:
        if not size:
            return np.empty(0, dtype=dtype)
        return mapped(f"{self.path}{suffix}", dtype)


def default_folder() -> Path:
    """Where entries are kept: NANOTRON_FAST_CACHE, or a folder of the user's cache."""
    given = os.environ.get("NANOTRON_FAST_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanotron_fast"


def cached_tokens(
    source: Source,
    recipe: Recipe,
    *,
    recipe_identity: str,
    token_size: int,
    folder: Path | None = None,
    workers: int = 1,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> CachedTokens:
    """The tokens of a source, from the cache or made now.

    Args:
        source: the documents.
        recipe: makes tokens of them.
        recipe_identity: a digest that changes with what the recipe makes of a text.
        token_size: bytes a token.
        folder: the cache; None for default_folder().
        workers: processes that make tokens.
        overwrite: make them again.
        on_progress: called now and then while they are made.

    Raises:
        DataError: the documents are malformed, or the cache cannot be written to.
        OSError: the documents cannot be read.
    """
    folder = default_folder() if folder is None else folder
    words = (_VERSION, source.identity(), recipe_identity, str(token_size))
    key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]
    entry = folder / "tokens" / key
    if overwrite or not entry.is_dir():
        with _kept_in(folder, source.name):
            entry.parent.mkdir(parents=True, exist_ok=True)
            with locked(entry.with_name(f"{key}.lock"), waits=True):
                if overwrite and entry.is_dir():
                    shutil.rmtree(entry)
                if not entry.is_dir():
                    _make(entry, source, recipe, token_size, workers, on_progress)
    return _opened(entry, source, token_size)


@contextmanager
def _kept_in(folder: Path, name: str) -> Iterator[None]:
    """What cannot be written to the cache is told with the way out: few know that there is one."""
    try:
        yield
    except OSError as error:
        path = Path(str(error.filename))
        if not path.is_relative_to(folder) and not folder.is_relative_to(path):
            raise
        raise DataError(
            f"{folder}: the tokens of {name} are kept there, and cannot be: "
            f"{error.strerror}: {path}; NANOTRON_FAST_CACHE names another folder"
        ) from error


def _make(
    entry: Path,
    source: Source,
    recipe: Recipe,
    token_size: int,
    workers: int,
    on_progress: Progress | None,
) -> None:
    done, total = 0, source.num_bytes
    with whole_folder(entry, yields=True) as partial:
        group_ends = []
        blocks = encode(source.blocks(), recipe, workers)
        with TokenWriter(partial / _TOKENS, token_size) as writer, closing(blocks):
            for encoded in blocks:
                writer.write(encoded)
                if encoded.ends_group:
                    group_ends.append(writer.num_tokens)
                done += encoded.num_bytes
                if on_progress is not None:
                    on_progress(done, total)
        groups = np.array(group_ends, dtype=INDEX_DTYPE).tobytes()
        write_file(partial / "groups", groups, fsync=False)
        about = {
            "source": source.name,
            "tokens": writer.num_tokens,
            "documents": writer.num_documents,
        }
        write_file(partial / "about.json", json.dumps(about, indent=2).encode(), fsync=False)


def _opened(entry: Path, source: Source, token_size: int) -> CachedTokens:
    path = entry / _TOKENS
    mapped.cache_clear()
    try:
        about = json.loads((entry / "about.json").read_text())
        groups = np.fromfile(entry / "groups", dtype=INDEX_DTYPE)
        num_tokens, num_documents = int(about["tokens"]), int(about["documents"])
        is_whole = (
            path.stat().st_size == num_tokens * token_size
            and Path(f"{path}.index").stat().st_size == num_documents * INDEX_DTYPE.itemsize
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{entry}: it cannot be read ({error}); delete it") from error
    if not is_whole:
        raise DataError(f"{entry}: its files are not as long as its about.json says; delete it")
    return CachedTokens(
        source.name,
        str(path),
        token_size,
        num_tokens,
        num_documents,
        groups.astype(np.int64) if source.is_grouped else None,
    )
