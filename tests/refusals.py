"""What every refusal has in common."""

from pathlib import Path
from typing import Any

import pytest

import nanotron_fast


def refused(
    source: Path, tmp_path: Path, error: type[Exception], message: str, **options: Any
) -> None:
    """Converts, and looks at the error and at what is left."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        nanotron_fast.convert(source, tmp_path / "out", **options)
    assert type(caught.value) is error
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
