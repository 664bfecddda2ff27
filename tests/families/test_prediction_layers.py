"""Layers that follow a model's own and predict later tokens: left out by a glob, which is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanotron_fast as nf
from nanotron_fast.errors import CheckpointError
from tests.families.zoo import save


def extended(root: Path, *names: str) -> dict[str, torch.Tensor]:
    """Adds tensors to a model's file, and returns those that were there."""
    path = save("glm4_moe", root, torch.bfloat16) / "model.safetensors"
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
    tensors = extended(tmp_path / "hf", *names)
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
    extended(tmp_path / "hf", "model.layers.4.enorm.weight", "model.layers.3.enorm.weight")
    with pytest.raises(CheckpointError, match="--ignore-tensors GLOB leaves out what is not"):
        nf.plan(tmp_path / "hf", tmp_path / "out")
