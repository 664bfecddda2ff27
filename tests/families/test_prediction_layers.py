"""Layers that follow a model's own and predict later tokens: left out by a glob, which is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanotron_fast as nf
from nanotron_fast.errors import CheckpointError
from tests.families.zoo import save
from tests.modelzoo import make, write_json


def extended(root: Path, *names: str, predicting: int | None) -> dict[str, torch.Tensor]:
    """Adds tensors to a model's file, and returns those that were there."""
    path = save("glm4_moe", root, torch.bfloat16) / "model.safetensors"
    config = json.loads((root / "config.json").read_text())
    write_json(root / "config.json", {**config, "num_nextn_predict_layers": predicting})
    tensors = load_file(path)
    # As published: the bias is in fp32, whatever the others are in.
    tensors |= {
        name: value.float() for name, value in tensors.items() if name.endswith("correction_bias")
    }
    more = {name: torch.ones(2, dtype=torch.bfloat16) for name in names}
    save_file({**tensors, **more}, path, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("has_side_file", [True, False])
def test_they_are_left_out(has_side_file: bool, tmp_path: Path) -> None:
    names = ("model.layers.4.eh_proj.weight", "model.layers.5.enorm.weight")
    tensors = extended(tmp_path / "hf", *names, predicting=2)
    globs = ("model.layers.4.*", "model.layers.5.*")
    told = " ".join(f"--ignore-tensors '{glob}'" for glob in globs).replace("*", r"\*")
    with pytest.raises(CheckpointError, match=f"has 4 layers, .* later tokens.* {told} leaves"):
        nf.plan(tmp_path / "hf", tmp_path / "out")
    nf.convert(tmp_path / "hf", tmp_path / "out", ignore_tensors=globs)
    if not has_side_file:
        (tmp_path / "out" / "nanotron_fast.json").unlink()
    nf.convert(tmp_path / "out", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: each.dtype for name, each in back.items()} == {
        name: each.dtype for name, each in tensors.items()
    }
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_what_else_is_left_over_is_no_such_layer(tmp_path: Path) -> None:
    names = ("model.layers.4.enorm.weight", "model.layers.3.enorm.weight")
    extended(tmp_path / "hf", *names, predicting=1)
    with pytest.raises(CheckpointError, match="--ignore-tensors GLOB leaves out what is not"):
        nf.plan(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("predicting", [None, 0, 1, 3])
def test_as_many_as_the_configuration_says(predicting: int | None, tmp_path: Path) -> None:
    names = ("model.layers.4.eh_proj.weight", "model.layers.5.enorm.weight")
    extended(tmp_path / "hf", *names, predicting=predicting)
    with pytest.raises(CheckpointError, match="json has 4 layers, and the files have 6: one of "):
        nf.plan(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("number", [None, 1])
@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_a_layer_too_many_is_none_to_leave_out(
    family: str, number: int | None, tmp_path: Path
) -> None:
    nf.convert(make(family, num_hidden_layers=4).save(tmp_path / "hf"), tmp_path / "nanotron")
    # The key is none of these families'.
    more = {} if number is None else {"num_nextn_predict_layers": number}
    for path in ("hf/config.json", "nanotron/model_config.json"):
        config = json.loads((tmp_path / path).read_text())
        write_json(tmp_path / path, {**config, "num_hidden_layers": 3, **more})
    for folder, name in (("hf", "config.json"), ("nanotron", "model_config.json")):
        with pytest.raises(CheckpointError) as told:
            nf.plan(tmp_path / folder, tmp_path / "out")
        assert f" {name} has 3 layers, and the files have 4: one of them is wrong" in str(
            told.value
        )
        assert "--ignore-tensors" not in str(told.value)
