"""Released models are planned from their config.json and headers alone: the files are holes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nanotron_fast as nf
from nanotron_fast.families import family_of_config
from nanotron_fast.families.hf_config import read_config
from nanotron_fast.formats.huggingface.checkpoint import layout_shards
from nanotron_fast.moves.dtypes import Dtype
from tests.families.released import RELEASED, Released


def hollow(root: Path, model: Released) -> Path:
    """The model's files, of the size that they have and with headers by the family's table."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(dict(model.config)))
    family = family_of_config(model.config)
    params = family.params(read_config(family, model.config))
    # A tensor may have several parts: q, say, where rotary pairs are turned.
    shapes = {part.name: part.tensors[0].shape for param in params for part in param.parts}
    tensors = [(name, Dtype.BF16, shape) for name, shape in shapes.items()]
    files, index = layout_shards(tensors, 5 * 10**9)
    if index is not None:
        (root / "model.safetensors.index.json").write_bytes(index)
    for file in files:
        with open(root / file.name, "wb") as out:
            out.write(file.header)
            out.truncate(file.size_bytes)
    return root


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_is_planned(name: str, tmp_path: Path) -> None:
    model = RELEASED[name]
    plan = nf.plan(hollow(tmp_path / "hf", model), tmp_path / "out", topology=model.topology)
    assert plan.family == model.config["model_type"]
    assert abs(plan.num_parameters / 1e9 / model.billions - 1) < 0.01
    assert set(plan.layer_stages) == {*range(model.topology.pp)}
