"""Blocks of text made into tokens, by one process or several."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.samples import Array
from nanotron_fast.train.data.text import Block, Lines, Piece, Rows
from nanotron_fast.train.data.tokenizer import Encoder, EncoderRecipe


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a block.

    Args:
        tokens: uint32, of its documents one after another.
        ends: int64, of each document that ends in the block, from the block's first token on.
        is_learned: bool, for each token, whether there is a loss of it; None for all of them.
        ends_group: the next block's texts are not joined to these.
        num_bytes: of the block.
    """

    tokens: Array
    ends: Array
    is_learned: Array | None
    ends_group: bool
    num_bytes: int


class BlockEncoder(Protocol):
    """What makes tokens of a block."""

    def __call__(self, block: Block, /) -> Encoded:
        """Raises DataError."""
        ...


class Recipe(Protocol):
    """What goes to another process, to make an encoder there."""

    def build(self) -> BlockEncoder:
        """The encoder."""
        ...


@dataclass(frozen=True, slots=True)
class TextRecipe:
    """For documents of plain text."""

    encoder: EncoderRecipe

    def build(self) -> BlockEncoder:
        return TextEncoder(Encoder(self.encoder))


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """Documents of plain text to tokens."""

    encoder: Encoder

    def __call__(self, block: Block, /) -> Encoded:
        if isinstance(block, Piece):
            return self._piece(block)
        if isinstance(block, Lines):
            texts, ends_group = [text for _, text in objects(block)], False
        else:
            texts, ends_group = list(block.rows), block.ends_group
            for number, text in enumerate(texts):
                if not isinstance(text, str):
                    place = block.place_of(number)
                    raise DataError(f"{place}: its text is {reprlib.repr(text)}, and not text")
        documents = self.encoder.documents(texts)
        return packed(documents, None, ends_group, block.num_bytes)

    def _piece(self, piece: Piece) -> Encoded:
        [tokens] = self.encoder.pieces([piece.text])
        before = self.encoder.prefix if piece.is_first else []
        after = self.encoder.suffix if piece.is_last else []
        encoded = packed([[*before, *tokens, *after]], None, False, piece.num_bytes)
        if piece.is_last:
            return encoded
        return Encoded(encoded.tokens, encoded.ends[:0], None, False, piece.num_bytes)


def packed(
    documents: list[list[int]],
    is_learned: list[list[bool]] | None,
    ends_group: bool,
    num_bytes: int,
) -> Encoded:
    """Documents one after another."""
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    tokens = np.fromiter(chain.from_iterable(documents), dtype=np.uint32, count=total)
    learned = None
    if is_learned is not None:
        learned = np.fromiter(chain.from_iterable(is_learned), dtype=np.bool_, count=total)
    return Encoded(tokens, ends, learned, ends_group, num_bytes)


def objects(block: Lines) -> Iterator[tuple[str, Any]]:
    """Each line's place, in words, and its text, or its object. Raises DataError."""
    for number, line in enumerate(block.data.split(b"\n"), start=block.first_line):
        if not line.strip():
            continue
        place = f"{block.path}, line {number:,}"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: it is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise DataError(f"{place}: a {type(found).__name__}, and not an object")
        if block.column is None:
            _check_characters(line, found, place)
            yield place, found
            continue
        if block.column not in found:
            keys = ", ".join(found) or "none"
            raise DataError(f"{place}: it has no key {block.column!r}; its keys: {keys}")
        text = found[block.column]
        if not isinstance(text, str):
            raise DataError(f"{place}: its {block.column!r} is {reprlib.repr(text)}, and not text")
        _check_characters(line, text, place)
        yield place, text


def _check_characters(line: bytes, value: Any, place: str) -> None:
    """Raises DataError where a line of JSON, or a text in it, escapes half of a character."""
    if b"\\u" not in line:  # a line of UTF-8 has whole ones
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        told = f"{half!r} is half of a surrogate pair, and no character"
        raise DataError(f"{place}: {told}") from error


def rows_of(block: Block) -> Iterator[tuple[str, Any]]:
    """Each row of a block, and its place in words."""
    if isinstance(block, Lines):
        yield from objects(block)
    elif isinstance(block, Rows):
        for number, row in enumerate(block.rows):
            yield block.place_of(number), row
    else:
        raise TypeError("a piece of text has no rows")
