"""Three steps of every family of the zoo beside a loop over transformers' model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.train.metrics import read_metrics
from tests.families.zoo import ZOO, save
from tests.train.runs import train
from tests.train.test_against_transformers import batches, check_steps


@pytest.mark.parametrize("name", ZOO)
def test_three_steps_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check_steps(save(name, tmp_path / "hf"), tmp_path / "run", 3, ZOO[name].tolerance)


def test_what_no_step_moves_is_kept(tmp_path: Path) -> None:
    """A router's correction bias is saved with the weights, and has neither states nor masters."""
    hf = save("deepseek_v3", tmp_path / "hf")
    common: dict[str, Any] = {
        "model": {"init_method": {"path": str(hf)}, "dtype": "bfloat16"},
        "tokens__train_steps": 2,
        "checkpoints__checkpoint_interval": 1,
        "batches": batches(4),
    }
    train(tmp_path / "run", **common)
    name = "model/model/decoder/1/pp_block/mlp/router/model_correction_bias.safetensors"
    nf.convert(hf, tmp_path / "there")
    for step in (1, 2):
        written = (tmp_path / "run" / str(step) / name).read_bytes()
        assert written[-32:] == (tmp_path / "there" / name).read_bytes()[-32:]
    straight = read_metrics(tmp_path / "run" / "metrics.jsonl")
    shutil.copytree(tmp_path / "run" / "1", tmp_path / "again" / "1")
    (tmp_path / "again" / "latest.txt").write_text("1")
    train(tmp_path / "again", **common, checkpoints__resume_checkpoint_path=str(tmp_path / "again"))
    (resumed,) = read_metrics(tmp_path / "again" / "metrics.jsonl")
    assert resumed["loss"] == straight[-1]["loss"]
    nf.reshard(tmp_path / "run" / "2", tmp_path / "two" / "2", tp=2)
    assert nf.verify(tmp_path / "run" / "2", tmp_path / "two" / "2").equal
    nf.convert(tmp_path / "two" / "2", tmp_path / "masters", master_weights=True)
    nf.convert(tmp_path / "run" / "2", tmp_path / "directly", master_weights=True)
    assert nf.verify(tmp_path / "masters", tmp_path / "directly").equal
