"""The tokenizer of a folder, as transformers makes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanotron_fast.errors import CheckpointError
from nanotron_fast.extras import require
from nanotron_fast.formats.huggingface.companions import companions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """What AutoTokenizer makes of a folder's files; the Hub is not asked.

    Raises CheckpointError, which names the folder, MissingPackageError.
    """
    require("train", "a tokenizer", ["transformers"])
    if not companions(folder).tokenizer:
        raise CheckpointError(
            f"{folder}: there is no tokenizer in it (tokenizer.json, tokenizer.model or the like)"
        )
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many tokenizer classes: their errors have no common base
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {reason}") from error
    return found
