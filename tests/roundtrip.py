"""There and back again."""

import json
from pathlib import Path
from typing import Any

import nanotron_fast


def there_and_back(source: Path, tmp_path: Path, **there: Any) -> Path:
    """Converts and converts back; returns the result."""
    nanotron_fast.convert(source, tmp_path / "there", **there)
    nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    return tmp_path / "back"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
