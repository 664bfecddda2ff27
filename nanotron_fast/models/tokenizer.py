"""The tokenizer of a folder, as transformers makes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanotron_fast.checkpoints.remote.mirror import shown
from nanotron_fast.checkpoints.remote.reason import reason
from nanotron_fast.errors import CheckpointError
from nanotron_fast.extras import require
from nanotron_fast.formats.huggingface.companions import companions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """What AutoTokenizer makes of a folder's files; the Hub is not asked.

    Raises CheckpointError, which names the folder or the URL that it stands for,
    MissingPackageError.
    """
    require("train", "a tokenizer", ["transformers"])
    if not companions(folder).tokenizer:
        raise CheckpointError(
            f"{shown(folder)}: there is no tokenizer in it (tokenizer.json, tokenizer.model or the "
            "like)"
        )
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many tokenizer classes: their errors have no common base
        raise CheckpointError(
            f"{shown(folder)}: its tokenizer cannot be loaded: {reason(error)}"
        ) from error
    return found
