"""`nanotron_fast.json`: what Nanotron's own files have no place for.

It lies at the root of a Nanotron checkpoint that we wrote, and is how the way back restores what
model_config.json cannot hold: the source's config, its vocabulary before padding, lists of token
ids. A checkpoint that Nanotron itself saved has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.json_file import read_json_object

NAME = "nanotron_fast.json"


@dataclass(frozen=True, slots=True)
class SideFile:
    """The file's fields."""

    tool_version: str
    family: str
    target: str
    dtype: str
    vocab_size: int
    # Of the model that this one was made from; None where it was made from nothing.
    config: Mapping[str, Any] | None
    generation_config: Mapping[str, Any] | None = None
    # Safetensors dtypes of the Hugging Face tensors that Nanotron keeps in another one.
    dtypes: Mapping[str, str] = field(default_factory=dict)
    # Paths of the files that were carried, for who replaces the checkpoint: they are its own.
    carried: Sequence[str] = ()
    # What Nanotron's config.yaml has no place for, of the run that wrote the checkpoint.
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file's contents."""
        return (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode()


def read_side_file(root: Path) -> SideFile | None:
    """The side file of a checkpoint, or None. Raises CheckpointError."""
    path = root / NAME
    if not path.is_file():
        return None
    document = read_json_object(path)
    kinds: dict[str, type | tuple[type, ...]] = {
        "tool_version": str,
        "family": str,
        "target": str,
        "dtype": str,
        "vocab_size": int,
        "config": (dict, type(None)),
        "generation_config": (dict, type(None)),
        "dtypes": dict,
    }
    for key, kind in kinds.items():
        if not isinstance(document.get(key), kind):
            raise CheckpointError(
                f"{path}: {key} is {document.get(key)!r}; delete the file to do without it"
            )
    vocab_size, dtypes = document["vocab_size"], document["dtypes"]
    if isinstance(vocab_size, bool) or vocab_size < 1:
        raise CheckpointError(
            f"{path}: vocab_size is {vocab_size!r}; delete the file to do without it"
        )
    if not all(isinstance(dtype, str) for dtype in dtypes.values()):
        raise CheckpointError(f"{path}: dtypes are no names; delete the file to do without it")
    # Keys of a later version are left alone.
    fields: dict[str, Any] = {key: document.get(key) for key in kinds}
    return SideFile(**fields)
