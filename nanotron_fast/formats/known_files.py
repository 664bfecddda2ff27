"""Which files belong to a checkpoint: those that this tool, Nanotron and transformers write."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterable
from pathlib import Path

# What this tool's own folders and files in a destination start with.
OURS = ".nanotron_fast."
# What readers look for first, in the order in which it may appear: a checkpoint has one of the
# last three.
MARKERS = (
    "model.safetensors.index.json",
    "model_config.json",
    "checkpoint_metadata.json",
    "config.json",
)
_PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*config.json"),
    *("*config.yaml", "checkpoint_metadata.json", "nanotron_fast.json", "latest.txt"),
    *("tokenizer*", "*.tiktoken", "*.model", "*.jinja", "vocab*", "merges.txt", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py", "*processing_*.py"),
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("trainer_state.json", "*_results.json"),
    *("README*", "LICENSE*", "NOTICE*", "USE_POLICY*", ".gitattributes"),
)
# Folders, and what the files in them are called.
_FOLDERS = {
    "model": ("*.safetensors",),
    "optimizer": ("*.pt", "*.json"),
    "lr_scheduler": ("*.pt",),
    "random": ("*.pt",),
    "additional_chat_templates": ("*.jinja",),
    "custom_generate": ("*.py", "*.txt"),
    ".cache": ("*",),
}


def foreign_names(root: Path, found: Iterable[str], own: Collection[str]) -> list[str]:
    """Of the names in a directory, those that no checkpoint has. Files named in `own` are one's.

    All of them where none of the marks of a checkpoint is there.
    """
    names = list(found)
    is_checkpoint = any(name in MARKERS or name.endswith(".safetensors") for name in names)
    if not is_checkpoint and not all(name.startswith(OURS) for name in names):
        return names
    return [name for name in names if not _is_known(root, name, own)]


def _is_known(root: Path, name: str, own: Collection[str]) -> bool:
    if name.startswith(OURS):
        return True
    path = root / name
    if not path.is_dir() or path.is_symlink():
        return name in own or _matches(name, _PATTERNS)
    # A folder that is written again may hold code, which a configuration's auto_map names.
    patterns = _FOLDERS.get(name, ("*.py",) if name in own else ())
    if not patterns:
        return False
    return all(all(_matches(file, patterns) for file in files) for _, _, files in os.walk(path))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
