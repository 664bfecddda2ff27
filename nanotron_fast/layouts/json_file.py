"""Reading a JSON document from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises CheckpointError, which names the file, or OSError."""
    try:
        document = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return document
