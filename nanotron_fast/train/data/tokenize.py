"""Text to a folder of token files, for `nanotron-fast tokenize`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.remote.urls import on_disk
from nanotron_fast.checkpoints.small_files import write_file
from nanotron_fast.errors import DataError
from nanotron_fast.train.data.encode import Encoded, TextRecipe
from nanotron_fast.train.data.text import open_source
from nanotron_fast.train.data.tokenizer import load_tokenizer, recipe, token_size, vocabulary
from nanotron_fast.train.data.worker import encode
from nanotron_fast.train.data.writing import TokenWriter, check_free, whole_folder

DEFAULT_TOKENS_PER_FILE = 10**9


@dataclass(frozen=True, slots=True)
class TokenizeReport:
    """What was written.

    Args:
        destination: the folder.
        files: names of the .ds files.
        documents: in all.
        tokens: in all, those after each document included.
        token_size: in bytes.
        seconds: it took, once the tokenizer was loaded.
    """

    destination: str
    files: tuple[str, ...]
    documents: int
    tokens: int
    token_size: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "files": list(self.files)}


def default_workers() -> int:
    """One a core that this process may use."""
    return len(os.sched_getaffinity(0))


def tokenize(
    source: str,
    destination: str | Path,
    *,
    tokenizer: str,
    workers: int | None = None,
    eos: bool = True,
    text_column: str = "text",
    split: str = "train",
    config_name: str | None = None,
    max_tokens_per_file: int = DEFAULT_TOKENS_PER_FILE,
    on_total: Callable[[int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> TokenizeReport:
    """Writes the tokens of text as a Nanoset, which is there when it is whole.

    The files are the same for any number of workers.

    Args:
        source: a file, folder or glob of .txt or .jsonl, or what `datasets.load_dataset` takes.
        destination: the folder to make.
        tokenizer: a name or folder for AutoTokenizer.
        workers: processes; None for default_workers().
        eos: end each document with the tokenizer's eos_token, and leave out its other special
            tokens; otherwise each has what the tokenizer adds of itself.
        text_column: the column, or JSON key, of the text.
        split: of a dataset.
        config_name: of a dataset.
        max_tokens_per_file: a file takes no further block of documents once it has so many.
        on_total: called once with the bytes of text there are; 0 where that is not known.
        on_progress: called now and then with the bytes of text that are done.

    Raises:
        DataError: the text or the tokenizer is missing or malformed, or the destination is not
            free.
        OSError: the destination cannot be written to; it names the file.
    """
    path = on_disk(destination, "the folder of tokens")
    check_free(path)
    if max_tokens_per_file < 1:
        raise DataError(f"max_tokens_per_file is {max_tokens_per_file}, and should be at least 1")
    documents = open_source(source, column=text_column, split=split, config_name=config_name)
    loaded = load_tokenizer(tokenizer)
    name = _lasting_name(tokenizer)
    if eos and loaded.eos_token_id is None:
        raise DataError(
            f"tokenizer {tokenizer}: it has no eos_token to end a document with; --no-eos does "
            "without"
        )
    size = token_size(vocabulary(loaded))
    encoder = TextRecipe(recipe(loaded, eos_token_id=loaded.eos_token_id if eos else None))
    started = time.monotonic()
    if on_total is not None:
        on_total(documents.num_bytes)
    blocks = encode(documents.blocks(), encoder, workers or default_workers())
    done = 0
    with whole_folder(path) as folder:
        files = _Files(folder, size, name, max_tokens_per_file)
        with files, closing(blocks):
            for encoded in blocks:
                files.write(encoded)
                done += encoded.num_bytes
                if on_progress is not None:
                    on_progress(done)
        around = 1 if eos else len(loaded("")["input_ids"])
        if files.num_tokens <= files.num_documents * around:
            raise DataError(f"{source}: there is no text in it")
    return TokenizeReport(
        str(path),
        tuple(files.names),
        files.num_documents,
        files.num_tokens,
        size,
        time.monotonic() - started,
    )


class _Files:
    """The token files of a folder, one after another."""

    def __init__(self, folder: Path, size: int, tokenizer: str, max_tokens: int) -> None:
        self.names: list[str] = []
        self.num_tokens = self.num_documents = 0
        self._folder = folder
        self._size = size
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._writer: TokenWriter | None = None
        # A long document comes in pieces, and stays in one file.
        self._is_within_document = False

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._writer is not None:
            self._writer.__exit__(*raised)
            if raised[0] is None:
                self._describe(self._writer)
            self._writer = None

    def write(self, encoded: Encoded) -> None:
        """Appends a block, to a new file where the last one is full."""
        is_full = self._writer is not None and self._writer.num_tokens >= self._max_tokens
        if is_full and not self._is_within_document:
            self.__exit__(None, None, None)
        if self._writer is None:
            self.names.append(f"{len(self.names):05d}_tokens.ds")
            self._writer = TokenWriter(self._folder / self.names[-1], self._size).__enter__()
        self._writer.write(encoded)
        self.num_tokens += len(encoded.tokens)
        self.num_documents += len(encoded.ends)
        ended = int(encoded.ends[-1]) if len(encoded.ends) else -1
        if len(encoded.tokens):
            self._is_within_document = ended != len(encoded.tokens)

    def _describe(self, writer: TokenWriter) -> None:
        lines = (
            f"{self._tokenizer}|{self._size}",
            str(writer.num_tokens),
            f"{in_words(writer.num_tokens)}T",
        )
        write_file(Path(f"{writer.path}.metadata"), "\n".join(lines).encode(), fsync=False)


def in_words(number: int) -> str:
    """A count with three digits and a prefix, as in "1.23 M"."""
    prefixes = ("", "k", "M", "G", "T", "P")
    scaled, power = float(number), 0
    while scaled >= 999.5 and power < len(prefixes) - 1:
        scaled, power = scaled / 1000, power + 1
    prefix = prefixes[power]
    digits = 0 if not prefix or scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f} {prefix}"


def _lasting_name(tokenizer: str) -> str:
    """A tokenizer's name that holds from any folder, for the metadata."""
    name = os.path.abspath(tokenizer) if os.path.isdir(tokenizer) else tokenizer
    if "|" in name or "\n" in name:
        raise DataError(f"tokenizer {name!r}: the metadata cannot hold a name with | or a line end")
    return name
