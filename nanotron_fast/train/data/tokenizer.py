"""Tokenizers: loaded when they are needed, told apart, and held against a model's vocabulary."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.remote.urls import is_url, without_password
from nanotron_fast.checkpoints.source import resolve_companions
from nanotron_fast.errors import DataError
from nanotron_fast.extras import require
from nanotron_fast.models.tokenizer import tokenizer_in

# Text beyond this is encoded in pieces: tokenizers take a hundred times its size in memory.
MAX_CHARACTERS = 2**20


def load_tokenizer(name: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a folder, or of a model of the Hub, where None is its newest revision.

    Raises DataError for a URL, CheckpointError, OSError, MissingPackageError.
    """
    if is_url(name):
        raise DataError(
            f"tokenizer {without_password(str(name))}: it is read from a folder or the Hub, not "
            "from a URL"
        )
    require("train", "a tokenizer", ["transformers"])
    loaded = tokenizer_in(resolve_companions(name, revision=revision))
    # As it is called in messages, wherever the Hub's cache is.
    loaded.name_or_path = str(name)
    return loaded


def vocabulary(tokenizer: Any) -> int:
    """The smallest vocabulary that has room for every token of a tokenizer."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    return max(len(tokenizer), largest + 1)


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises DataError where a tokenizer has tokens that the model has not."""
    needed = vocabulary(tokenizer)
    if needed > vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path}: its vocabulary is {needed:,}, and the model's is "
            f"{vocab_size:,}: give model.model_config.vocab_size room for it, or take the model's "
            "own tokenizer"
        )


def token_size(vocab_size: int) -> int:
    """Bytes a token of a vocabulary takes on disk: 2 where they suffice."""
    return 2 if vocab_size <= 2**16 else 4


def fingerprint(tokenizer: Any) -> str:
    """A digest of all that a tokenizer makes of text, its chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        type(tokenizer).__name__,
        backend.to_str()
        if backend is not None
        else json.dumps(sorted(tokenizer.get_vocab().items())),
        str(getattr(tokenizer, "chat_template", None)),
        str(tokenizer.special_tokens_map),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class EncoderRecipe:
    """A tokenizer in a form that another process makes again at once.

    Args:
        backend: the JSON of a fast tokenizer; None for one that is pickled.
        pickled: a tokenizer of transformers; empty where the backend suffices.
        eos_token_id: put after each document, in place of the tokenizer's own special tokens; None
            to have those.
    """

    backend: str | None
    pickled: bytes
    eos_token_id: int | None


def recipe(tokenizer: Any, *, eos_token_id: int | None = None) -> EncoderRecipe:
    """How to encode text as this tokenizer does; without transformers, unless it is slow."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return EncoderRecipe(None, pickle.dumps(tokenizer), eos_token_id)
    return EncoderRecipe(backend.to_str(), b"", eos_token_id)


class Encoder:
    """Text to token ids, special tokens included."""

    def __init__(self, recipe: EncoderRecipe) -> None:
        self._backend: Any = None
        self._tokenizer: Any = None
        if recipe.backend is not None:
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_str(recipe.backend)
            # A tokenizer's file may ask for these, and transformers switches them off as well.
            self._backend.no_truncation()
            self._backend.no_padding()
        else:
            self._tokenizer = pickle.loads(recipe.pickled)
        self.prefix, self.suffix = (
            self._special_tokens() if recipe.eos_token_id is None else ([], [recipe.eos_token_id])
        )

    def _encode(self, texts: list[str], *, special: bool = False) -> list[list[int]]:
        if self._backend is not None:
            encode = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)
            return [each.ids for each in encode(texts, add_special_tokens=special)]
        return [self._tokenizer.encode(text, add_special_tokens=special) for text in texts]

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before a text, and after it."""
        [bare], [whole] = self._encode(["a"]), self._encode(["a"], special=True)
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        raise DataError(f"the tokenizer makes {whole} of 'a', which does not contain its {bare}")

    def pieces(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts that are not whole documents, without special tokens."""
        return self._encode(texts)

    def documents(self, texts: list[str]) -> list[list[int]]:
        """The tokens of whole documents."""
        cut = [split(text) for text in texts]
        encoded = iter(self._encode([piece for pieces in cut for piece in pieces]))
        return [
            [*self.prefix, *(token for _ in pieces for token in next(encoded)), *self.suffix]
            for pieces in cut
        ]


def split(text: str) -> list[str]:
    """A long text in pieces, each of which ends where a line does and the next begins with a word.

    There nearly every tokenizer cuts as well.
    """
    if len(text) <= MAX_CHARACTERS:
        return [text]
    pieces, begin = [], 0
    while len(text) - begin > MAX_CHARACTERS:
        end = _cut(text, begin + MAX_CHARACTERS // 2, begin + MAX_CHARACTERS)
        pieces.append(text[begin:end])
        begin = end
    return [*pieces, text[begin:]]


def _cut(text: str, least: int, most: int) -> int:
    """The last good place to cut a text between two others: after a line, a space, or at `most`."""
    for mark in ("\n", " "):
        place = most
        while (place := text.rfind(mark, least, place)) >= 0:
            if not text[place + 1].isspace():
                # A space belongs to the word after it.
                return place + 1 if mark == "\n" else place
    return most
