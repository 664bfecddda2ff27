"""States of training where tensor-parallel ranks have copies of a key-value head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nanotron_fast as nf
from nanotron_fast.errors import CheckpointError
from tests.checkpoints.test_reshard_states import load, same_checkpoint
from tests.modelzoo import make, read_tensors
from tests.train.runs import train

QKV = "model.decoder.0.pp_block.attn.qkv_proj.weight"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after a step on one rank, of a model with one key-value head."""
    root = tmp_path_factory.mktemp("trained")
    hf = make("llama", num_hidden_layers=2, num_key_value_heads=1).save(root / "hf")
    choices: dict[str, Any] = {"target": "nanotron-fast", "model_class": "nanotron-fast"}
    nf.convert(hf, root / "own", **choices)
    model = {"init_method": {"path": str(root / "own")}, "dtype": "bfloat16"}
    data = {"name": "one", "start_training_step": 1, "data": {"dataset": None, "seed": 3}}
    train(root / "run", model=model, data_stages=[data], tokens__train_steps=1)
    return root / "run" / "1"


@pytest.mark.parametrize(
    "there",
    [{"tp": 2, "dp": 3, "zero_stage": 1}, {"tp": 4, "pp": 2, "dp": 1, "zero_stage": 0}],
    ids=str,
)
def test_there_and_back(one: Path, there: dict[str, int], tmp_path: Path) -> None:
    nf.reshard(one, tmp_path / "there", **there)
    assert nf.inspect(tmp_path / "there").kv_head_copies == there["tp"]
    nf.reshard(tmp_path / "there", tmp_path / "back", tp=1, pp=1, dp=1, zero_stage=0)
    same_checkpoint(one, tmp_path / "back")
    for name, source in (("one", one), ("there", tmp_path / "there")):
        nf.convert(source, tmp_path / f"{name}-masters", master_weights=True)
    masters = read_tensors(tmp_path / "there-masters")
    assert masters == read_tensors(tmp_path / "one-masters")
    # Ranks have the same of the head, and each its own queries.
    files = sorted((tmp_path / "there" / "optimizer").glob("*pp-0*.pt"))
    if not there["zero_stage"]:
        masters_of = [load(path)["gradient_accumulator"][QKV] for path in files]
        assert len(masters_of) == there["tp"]
        queries = 64 // there["tp"]
        for each in masters_of[1:]:
            assert torch.equal(each[queries:], masters_of[0][queries:])
            assert not torch.equal(each[:queries], masters_of[0][:queries])


@pytest.mark.parametrize(
    ("state", "use"),
    [
        ("exp_avg", lambda there, out: nf.reshard(there, out, tp=1)),
        ("gradient_accumulator", lambda there, out: nf.reshard(there, out, tp=4)),
        ("gradient_accumulator", lambda there, out: nf.convert(there, out, master_weights=True)),
    ],
    ids=["a moment, to one rank", "a master, to four", "a master, to Hugging Face"],
)
def test_copies_that_differ_are_refused(
    one: Path, state: str, use: Callable[[Path, Path], Any], tmp_path: Path
) -> None:
    there = tmp_path / "there"
    nf.reshard(one, there, tp=2, dp=1, zero_stage=0)
    (path,) = (there / "optimizer").glob("*tp-1*.pt")
    document = torch.load(path, weights_only=True)
    index = next(index for index, name in document["names"].items() if name == QKV)
    kept = document[state] if state in document else document["state"][index]
    kept[QKV if state in document else state][-1, -1] += 1
    torch.save(document, path)
    message = rf"ranks 0 and 1 of TP=2 have copies of one key-value head of {state} of {QKV}, which"
    with pytest.raises(CheckpointError, match=message):
        use(there, tmp_path / "out")
    assert not (tmp_path / "out").exists()
