"""Reading a JSON document from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.lfs import HINT, is_pointer
from nanotron_fast.formats.plain_file import read_small

# Configurations are nested about five deep. Python's own walks end at some hundreds.
_MAX_DEPTH = 64


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises CheckpointError, which names the file, or OSError."""
    data = read_small(path)
    if is_pointer(data):
        raise CheckpointError(f"{path}: {HINT}")
    try:
        document = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _too_deep(path) from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    _check(path, document)
    return document


def _check(path: Path, document: dict[str, Any]) -> None:
    """Refuses what is nested too deeply, or holds text that no file could hold."""
    level: list[Any] = [document]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and not item.isascii():
                try:
                    item.encode("utf-8")
                except UnicodeEncodeError:
                    raise CheckpointError(
                        f"{path}: {item!r} is not text: half a surrogate pair"
                    ) from None
        if not below:
            return
        level = below
    raise _too_deep(path)


def _too_deep(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: nested more than {_MAX_DEPTH} deep")
