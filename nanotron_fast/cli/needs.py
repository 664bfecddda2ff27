"""What each command needs beside the converter's packages, said before its arguments are read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from nanotron_fast.extras import require

_HELP = {"-h", "--help"}


def check(words: Sequence[str]) -> None:
    """Raises MissingPackageError where what a command line asks for cannot work here.

    Help can always be had.

    Args:
        words: the command's name and what follows it.
    """
    if not words:
        return
    name, rest = words[0], words[1:]
    # What follows a script is its own.
    options = set(takewhile(_is_option, rest) if name == "run" else rest)
    if options & _HELP:
        return
    command = f"nanotron-fast {name}"
    if (name == "train" and "--dry-run" not in options) or name == "generate":
        require("train", command)
    elif name == "tokenize":
        require("train", command, ["transformers"])
    elif name == "run":
        require("kernels", command)
    elif name == "plot":
        require("plot", command)
    elif name == "verify" and "--logits" in options:
        require("logits", f"{command} --logits")


def _is_option(word: str) -> bool:
    return word.startswith("-")
