"""Headers that we write, as others read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from nanotron_fast.formats.safetensors import build_header
from nanotron_fast.moves.dtypes import Dtype


@pytest.mark.parametrize("num_tensors", [1, 40, 400])
def test_the_data_starts_on_a_page(tmp_path: Path, num_tensors: int) -> None:
    tensors = [(f"weights.{i}", Dtype.F32, (1, 2)) for i in range(num_tensors)]
    header, offsets = build_header(tensors, {"format": "pt"})
    assert len(header) % 4096 == 0
    assert offsets["weights.0"] == len(header)
    (tmp_path / "x.safetensors").write_bytes(header + bytes(8 * num_tensors))
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert len(file.keys()) == num_tensors
        assert file.metadata() == {"format": "pt"}
