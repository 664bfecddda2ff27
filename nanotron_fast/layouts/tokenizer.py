"""The files of a tokenizer, which travel with a checkpoint unread."""

from __future__ import annotations

from pathlib import Path

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
)


def tokenizer_files(root: Path) -> list[Path]:
    """Those of a directory, in a fixed order."""
    return [root / name for name in NAMES if (root / name).is_file()]
