"""Apertus: what its config.json leaves out, and an activation that has parameters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import nanotron_fast as nf
from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.models import build
from tests.families.zoo import save
from tests.modelzoo import make


def edited(root: Path, **changes: Any) -> Path:
    """The zoo's model, whose config.json has other keys; `...` takes one out."""
    save("apertus", root, torch.bfloat16)
    config = json.loads((root / "config.json").read_text())
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        config.pop(key, None)
    (root / "config.json").write_text(json.dumps({**config, **changes}))
    return root


def test_angles_are_scaled_where_nothing_is_said(tmp_path: Path) -> None:
    spec = nf.plan(edited(tmp_path / "hf"), tmp_path / "out").spec
    assert spec.rope_theta == 12e6
    assert spec.rope_scaling is not None
    assert (spec.rope_scaling["rope_type"], spec.rope_scaling["factor"]) == ("llama3", 8.0)


def test_null_is_read_otherwise_by_each_version(tmp_path: Path) -> None:
    source = edited(tmp_path / "hf", rope_scaling=None)
    with pytest.raises(ConfigError, match="rope_scaling is null, which transformers 4 takes for"):
        nf.plan(source, tmp_path / "out")


def test_a_model_that_starts_anew_has_the_slopes_of_the_paper(tmp_path: Path) -> None:
    hf = save("apertus", tmp_path / "hf")
    numbers = build(build(hf).architecture, seed=1).state_dict()
    act = "model.decoder.0.pp_block.mlp.act_fn."
    assert math.isclose(numbers[f"{act}alpha_p"].exp().log1p(), 0.8, rel_tol=1e-6)
    assert math.isclose(numbers[f"{act}alpha_n"].exp().log1p(), 0.3, rel_tol=1e-6)
    assert numbers[f"{act}beta"].item() == 0.5
    assert math.isclose(numbers[f"{act}eps"].item(), -1e-6, rel_tol=1e-6)


def test_no_other_family_has_its_activation(tmp_path: Path) -> None:
    source = make("llama", hidden_act="xielu").save(tmp_path / "hf")
    with pytest.raises(UnsupportedModelError, match="hidden_act 'xielu' is not one of"):
        nf.plan(source, tmp_path / "out", target="nanotron-fast")
