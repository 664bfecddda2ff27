"""Checkpoints of training at another topology: every state is there, bit for bit."""

from __future__ import annotations

import json
import math
import random
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import nanotron_fast
from nanotron_fast.checkpoints.reshard import reshard
from nanotron_fast.formats.nanotron.checkpoint import read_nanotron
from nanotron_fast.formats.nanotron.optimizer import MASTERS, found_files

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "training" / "llama_tied_tp2_zero0"
EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True, mmap=True)


def same(one: Any, other: Any, where: str = "") -> None:
    """Compares documents, their order and every bit of their tensors included."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        assert torch.equal(one.detach().view(-1), other.detach().view(-1)), where
    else:
        assert one == other, where


def same_checkpoint(one: Path, other: Path) -> None:
    """Compares two checkpoints of the same topology, but for where they lie."""
    names = [
        sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        for root in (one, other)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if name.startswith("random/") or name == "config.yaml":
            continue
        if name.endswith(".pt"):
            same(load(one / name), load(other / name), name)
        elif name.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(one / name, "pt") as a, safe_open(other / name, "pt") as b:
                assert (a.metadata() or {}) == (b.metadata() or {})
                assert torch.equal(a.get_tensor("data"), b.get_tensor("data"))
        else:
            assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())


@pytest.mark.parametrize(
    "there",
    [
        {"tp": 1},
        {"tp": 4, "pp": 2},
        {"tp": 4, "pp": 4, "dp": 3, "zero_stage": 1},
        {"tp": 2, "dp": 5, "zero_stage": 1},
        {"tp": 1, "pp": 2, "dp": 8, "zero_stage": 1},
    ],
    ids=str,
)
def test_there_and_back(tmp_path: Path, there: dict[str, int]) -> None:
    reshard(GOLDEN, tmp_path / "there" / "2", **there)
    reshard(tmp_path / "there", tmp_path / "back" / "2", tp=2, pp=1, dp=1, zero_stage=0)
    same_checkpoint(GOLDEN / "2", tmp_path / "back" / "2")
    assert (tmp_path / "back" / "latest.txt").read_text() == "2"
    masters_agree(tmp_path / "there" / "2")


def masters_agree(folder: Path) -> None:
    """The weights are the masters, rounded."""
    files, sizes = found_files(folder)
    weights = read_nanotron(folder)
    for name, shards in weights.params.items():
        for shard in shards:
            flat: list[torch.Tensor] = []
            for place, path in sorted(files.items()):
                if place.tp == shard.tp_rank:
                    masters = load(path)[MASTERS]
                    if name in masters and (
                        place.pp == shard.pp_rank or name not in weights.sharded
                    ):
                        flat.append(masters[name].detach().reshape(-1))
            whole = torch.cat(flat)[: math.prod(shard.info.shape)]
            raw = shard.path.read_bytes()[shard.info.begin_bytes :]
            stored = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16)
            assert torch.equal(whole.to(torch.bfloat16), stored), name
    assert sizes.zero_stage in (0, 1)


def test_a_file_is_what_nanotron_would_have_written(tmp_path: Path) -> None:
    out = tmp_path / "2"
    reshard(GOLDEN, out, tp=1, pp=2, dp=2, zero_stage=1)
    folder = out / "optimizer"
    assert sorted(path.name for path in folder.iterdir()) == [
        "optimizer_config.json",
        *(
            f"optimizer_pp-{p}-of-2_dp-{d}-of-2_tp-0-of-1_exp-0-of-1.pt"
            for p in (0, 1)
            for d in (0, 1)
        ),
    ]
    golden = [load(path) for path in sorted((GOLDEN / "2" / "optimizer").glob("*.pt"))]
    names = list(golden[0]["names"].values())
    last = [name for name in names if "decoder.3" in name or "final_layer_norm" in name]
    for rank in (0, 1):
        first = load(folder / f"optimizer_pp-0-of-2_dp-{rank}-of-2_tp-0-of-1_exp-0-of-1.pt")
        assert list(first) == ["state", "param_groups", "names", MASTERS]
        assert list(first["names"].values()) == [name for name in names if name not in last]
        second = load(folder / f"optimizer_pp-1-of-2_dp-{rank}-of-2_tp-0-of-1_exp-0-of-1.pt")
        # The head's stage has the tied matrix as well, under the embedding's name.
        assert list(second["names"].values()) == [*last, EMBEDDING]
        assert [group["params"] for group in second["param_groups"]] == [
            [index] for index in range(len(last) + 1)
        ]
        whole = torch.cat([document["state"][0]["exp_avg"] for document in golden])
        half = whole.view(-1).chunk(2)[rank]
        assert torch.equal(first["state"][0]["exp_avg"], half)
        assert torch.equal(second["state"][len(last)]["exp_avg"], half)
        assert first["state"][0]["step"].item() == 2
    config = json.loads((folder / "optimizer_config.json").read_text())
    assert config["type"] == "ZeroDistributedOptimizer"
    assert config["parallelism"] == {
        "tp_size": "1",
        "dp_size": "2",
        "pp_size": "2",
        "expert_parallel_size": "1",
    }
    offsets = config["configs"]["param_name_to_dp_rank_offsets"]
    assert list(offsets) == names
    assert offsets[EMBEDDING] == {"0": ["0", "16384"], "1": ["16384", "32768"]}
    assert config["configs"]["orig_param_shapes"][EMBEDDING] == ["512", "64"]
    rates = load(out / "lr_scheduler" / "lr_scheduler_pp-1-of-2_tp-0-of-1_exp-0-of-1.pt")
    was = load(GOLDEN / "2" / "lr_scheduler" / "lr_scheduler_pp-0-of-1_tp-0-of-2_exp-0-of-1.pt")
    assert list(rates) == list(was)
    assert len(rates["base_lrs"]) == len(rates["lr_lambdas"]) == len(last) + 1
    assert rates["last_epoch"] == was["last_epoch"]
    metadata = json.loads((out / "checkpoint_metadata.json").read_text())
    before = json.loads((GOLDEN / "2" / "checkpoint_metadata.json").read_text())
    assert metadata == {**before, "tp": 1, "dp": 2}
    document = yaml.safe_load((out / "config.yaml").read_text())
    assert document["parallelism"]["tp"] == 1
    assert (document["parallelism"]["pp"], document["parallelism"]["dp"]) == (2, 2)
    assert document["optimizer"]["zero_stage"] == 1
    assert document["checkpoints"]["resume_checkpoint_path"] == str(out)
    assert sorted(path.name for path in (out / "random").iterdir()) == [
        f"tp-0-of-1_dp-{d}-of-2_pp-{p}-of-2.pt" for d in (0, 1) for p in (0, 1)
    ]


def test_programs_that_unpack_zip_files_find_no_fault(tmp_path: Path) -> None:
    reshard(GOLDEN, tmp_path / "2", tp=1, dp=3, zero_stage=1, workers=2)
    paths = sorted((tmp_path / "2").glob("*/*.pt"))
    assert len(paths) == 3 + 1 + 3
    for path in paths[:4]:
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None, path


def make_states(
    folder: Path, *, dtype: torch.dtype = torch.float32, without: Collection[str] = ()
) -> Path:
    """States of training for a checkpoint of weights alone at TP=1 and PP=1.

    `without`: parameters that are not trained.
    """
    checkpoint = read_nanotron(folder)
    generator = torch.Generator().manual_seed(0)
    names = [name for name in checkpoint.params if name not in without]
    random.Random(0).shuffle(names)
    names.sort(key=lambda name: name.rsplit(".", 4)[0])
    state: dict[int, Any] = {}
    masters: dict[str, Any] = {}
    for index, name in enumerate(names):
        shape = checkpoint.params[name][0].info.shape
        moments = {
            key: torch.randn(shape, generator=generator).to(dtype)
            for key in ("exp_avg", "exp_avg_sq")
        }
        state[index] = {"step": torch.tensor(7.0), **moments}
        masters[name] = torch.randn(shape, generator=generator)
    groups = [{"lr": 0.1 * index, "params": [index]} for index in range(len(names))]
    document = {
        "state": state,
        "param_groups": groups,
        "names": dict(enumerate(names)),
        MASTERS: masters,
    }
    (folder / "optimizer").mkdir()
    torch.save(document, folder / "optimizer" / "optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt")
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_moe", "starcoder2"])
def test_any_topology_after_any_other(tmp_path: Path, family: str) -> None:
    from tests.modelzoo import make

    hf = make(family, num_hidden_layers=2).save(tmp_path / "hf")
    first = tmp_path / "first"
    nanotron_fast.convert(hf, first)
    make_states(first)
    chosen = random.Random(family)
    last = first
    for number in range(3):
        sizes = {
            "tp": chosen.choice([1, 2]),
            "pp": chosen.choice([1, 2]),
            "dp": chosen.choice([1, 2, 3, 7]),
            "zero_stage": chosen.choice([0, 1]),
        }
        out = tmp_path / str(number)
        reshard(last, out, **sizes)
        last = out
    reshard(last, tmp_path / "back", tp=1, pp=1, dp=1, zero_stage=0)
    for name in ("optimizer/optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt",):
        one, other = load(first / name), load(tmp_path / "back" / name)
        assert sorted(one["names"].values()) == sorted(other["names"].values())
        for index, key in one["names"].items():
            there = next(i for i, found in other["names"].items() if found == key)
            same(one["state"][index], other["state"][there], key)
            same(one[MASTERS][key], other[MASTERS][key], key)
            groups = one["param_groups"][index], other["param_groups"][there]
            assert groups[0]["lr"] == groups[1]["lr"]
    assert nanotron_fast.verify(first, tmp_path / "back").equal
