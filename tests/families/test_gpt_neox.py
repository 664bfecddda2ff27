"""GPT-NeoX: the keys of its config.json, and what old files of it keep among the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.errors import CheckpointError, ConfigError
from tests.families.zoo import save


def edited(root: Path, **changes: Any) -> Path:
    """The zoo's model with keys as transformers 4 writes them, and others; `...` is none."""
    save("gpt_neox", root, torch.bfloat16)
    config = json.loads((root / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta", "partial_rotary_factor"):
        config.pop(key, None)
    config = {**config, "rotary_pct": 0.25, "rotary_emb_base": 10000, **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    (root / "config.json").write_text(json.dumps(config))
    return root


def test_the_keys_of_version_4_come_back_as_they_are(tmp_path: Path) -> None:
    source = edited(tmp_path / "hf", rotary_pct=0.8, rotary_emb_base=20000, num_key_value_heads=2)
    report = nf.convert(source, tmp_path / "there", topology=Topology(tp=2))
    assert report.plan.spec.rope_theta == 20000.0
    assert report.plan.spec.num_kv_heads == 8  # no key says so to its class
    assert report.plan.spec.attention.rotary == (0, 6)  # of eight rows
    nf.convert(tmp_path / "there", tmp_path / "back")
    said = json.loads((source / "config.json").read_text())
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back == said


def test_without_a_side_file_both_versions_read_what_is_written(tmp_path: Path) -> None:
    source = edited(tmp_path / "hf", rotary_pct=0.5, rotary_emb_base=500)
    nf.convert(source, tmp_path / "there")
    (tmp_path / "there" / "nanotron_fast.json").unlink()
    nf.convert(tmp_path / "there", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (back["rotary_pct"], back["rotary_emb_base"]) == (0.5, 500.0)
    assert not {"rope_theta", "partial_rotary_factor", "num_key_value_heads"} & back.keys()
    assert nf.verify(source, tmp_path / "back").equal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_emb_base": 500, "rope_theta": 10000.0}, "rope_theta is 10000.0 .* 500 in"),
        ({"rotary_pct": 0.5, "partial_rotary_factor": 1.0}, "0.5 in rotary_pct"),
    ],
)
def test_two_names_of_one_thing_must_agree(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        nf.plan(edited(tmp_path / "hf", **changes), tmp_path / "out")


def test_masks_that_old_files_keep_are_no_weights(tmp_path: Path) -> None:
    source = edited(tmp_path / "hf")
    path = source / "model.safetensors"
    tensors = load_file(path)
    attention = "gpt_neox.layers.0.attention."
    masks = {
        f"{attention}bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        f"{attention}masked_bias": torch.tensor(-1e9),
        f"{attention}rotary_emb.inv_freq": torch.ones(1),
    }
    save_file({**tensors, **masks}, path, metadata={"format": "pt"})
    nf.convert(source, tmp_path / "there")
    assert nf.verify(source, tmp_path / "there").equal
    save_file({**tensors, "attention.bias": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"Nanotron's gpt_neox: attention\.bias"):
        nf.plan(source, tmp_path / "out")
