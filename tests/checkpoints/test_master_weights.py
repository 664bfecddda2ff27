"""The fp32 masters of a training, exported in the place of its weights."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nanotron_fast
from nanotron_fast.checkpoints.plan.masters import within
from nanotron_fast.checkpoints.reshard import reshard
from nanotron_fast.errors import CheckpointError, ConfigError
from nanotron_fast.families.parts import Share
from nanotron_fast.formats.nanotron.optimizer import MASTERS
from tests.checkpoints.test_reshard_states import GOLDEN, make_states
from tests.modelzoo import make


def exported(source: Path, out: Path, **choices: Any) -> dict[str, torch.Tensor]:
    nanotron_fast.convert(source, out, master_weights=True, **choices)
    return load_file(out / "model.safetensors")


def test_masters_round_to_the_weights(tmp_path: Path) -> None:
    masters = exported(GOLDEN, tmp_path / "masters")
    nanotron_fast.convert(GOLDEN, tmp_path / "weights")
    weights = load_file(tmp_path / "weights" / "model.safetensors")
    assert masters.keys() == weights.keys()
    differ = 0
    for name, master in masters.items():
        assert master.dtype is torch.float32
        assert torch.equal(master.to(torch.bfloat16), weights[name]), name
        differ += int((master != weights[name].float()).sum())
    assert differ > 1000
    config = json.loads((tmp_path / "masters" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    rounded = exported(GOLDEN, tmp_path / "rounded", dtype="bf16")
    assert all(torch.equal(rounded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_moe", "starcoder2"])
def test_any_topology_gives_the_same(tmp_path: Path, family: str) -> None:
    hf = make(family, num_hidden_layers=2).save(tmp_path / "hf")
    interleaved = {"rope_interleaved": True} if family == "llama" else {}
    nanotron_fast.convert(hf, tmp_path / "one", **interleaved)
    make_states(tmp_path / "one")
    wanted = exported(tmp_path / "one", tmp_path / "wanted")
    number = next(iter((tmp_path / "one" / "optimizer").glob("*.pt")))
    stored = torch.load(number, weights_only=True)[MASTERS]
    assert sum(each.numel() for each in wanted.values()) == sum(
        each.numel() for each in stored.values()
    )
    for dp, sizes in ((3, {"tp": 2, "pp": 2}), (7, {"tp": 1}), (64, {"tp": 2})):
        reshard(tmp_path / "one", tmp_path / f"dp{dp}", dp=dp, zero_stage=1, **sizes)
        found = exported(tmp_path / f"dp{dp}", tmp_path / f"out{dp}")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_where_there_are_none(tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / "2", tmp_path / "source"))
    for path in (source / "optimizer").glob("*.pt"):
        document = torch.load(path, weights_only=True)
        document.pop(MASTERS)
        torch.save(document, path)
    with pytest.raises(CheckpointError, match=r"--master-weights: .*kept no masters"):
        exported(source, tmp_path / "out")
    shutil.rmtree(source / "optimizer")
    with pytest.raises(CheckpointError, match=r"--master-weights: .*has no optimizer/"):
        exported(source, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--master-weights: it has no meaning"):
        exported(source, tmp_path / "out", to="nanotron")
    assert not (tmp_path / "out").exists()


def test_a_run_of_a_share_is_boxes() -> None:
    """Of boxes of any strides, against one element after another."""
    chosen = random.Random(0)
    for _ in range(300):
        sizes = [chosen.randint(1, 4) for _ in range(3)]
        order = chosen.sample(range(3), 3)
        strides, stride = [0, 0, 0], chosen.choice([1, 2])
        for dim in order:
            strides[dim] = stride
            stride *= sizes[dim] + chosen.randint(0, 1)
        low = [chosen.randint(0, 3) for _ in range(3)]
        high = [a + size for a, size in zip(low, sizes, strict=True)]
        share = Share(tuple(low), tuple(high), chosen.randint(0, 5), tuple(strides))  # type: ignore[arg-type]
        first = chosen.randint(0, 20)
        end = first + chosen.randint(1, 60)
        found: list[tuple[tuple[int, ...], int]] = []
        for box in within(share, first, end):
            found += [(index, at + first) for index, at in elements(box)]
        wanted = [(index, at) for index, at in elements(share) if first <= at < end]
        assert sorted(found) == sorted(wanted)


def elements(share: Share) -> list[tuple[tuple[int, ...], int]]:
    ranges = [range(a, b) for a, b in zip(share.low, share.high, strict=True)]
    return [
        (
            index,
            share.offset
            + sum(
                (i - a) * stride
                for i, a, stride in zip(index, share.low, share.strides, strict=True)
            ),
        )
        for index in itertools.product(*ranges)
    ]
