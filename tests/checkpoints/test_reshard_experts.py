"""States of experts that are split over ranks, at any topology after any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import nanotron_fast
from nanotron_fast import Topology
from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.reshard import plan, reshard
from nanotron_fast.checkpoints.stored import NanotronModel
from nanotron_fast.errors import CheckpointError, TopologyError
from nanotron_fast.formats.nanotron.checkpoint import read_nanotron
from nanotron_fast.formats.nanotron.optimizer import MASTERS, runs_of
from nanotron_fast.train.optimizer_states import StoredStates
from tests.checkpoints.test_reshard_states import load, make_states, same
from tests.families.zoo import save
from tests.modelzoo import make

WHOLE = "pp-0-of-1_tp-0-of-1_exp-0-of-1.pt"
GATE_UP = "model.decoder.0.pp_block.mlp.experts.merged_gate_up_proj"
FAMILIES = ("qwen2_moe", "qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where checkpoints of training lie that were made, by their families."""
    return {"root": tmp_path_factory.mktemp("trained")}


def trained(family: str, made: dict[str, Path]) -> Path:
    """A checkpoint of training of one rank, and a configuration of it."""
    if family not in made:
        hf = made["root"] / f"{family}-hf"
        if family == "qwen2_moe":
            make(family, num_hidden_layers=2).save(hf)
        else:
            save(family, hf, torch.bfloat16)
        folder = made["root"] / family
        nanotron_fast.convert(hf, folder, target="nanotron-fast", model_class="nanotron-fast")
        frozen = {param.name for param in params_of(folder).values() if param.is_frozen}
        make_states(folder, without=frozen)
        names = load(folder / "optimizer" / f"optimizer_{WHOLE}")["names"].values()
        (folder / "lr_scheduler").mkdir()
        rates = {
            "base_lrs": [0.5 + index for index in range(len(names))],
            "last_epoch": 7,
            "lr_lambdas": [{} for _ in names],
        }
        torch.save(rates, folder / "lr_scheduler" / f"lr_scheduler_{WHOLE}")
        document = {"parallelism": {"tp": 1, "pp": 1, "dp": 1}, "optimizer": {"zero_stage": 0}}
        (folder / "config.yaml").write_text(yaml.safe_dump(document))
        made[family] = folder
    return made[family]


def params_of(folder: Path) -> dict[str, Any]:
    model = NanotronModel(read_nanotron(folder), Options())
    return {param.name: param for param in model.params()}


def states_of(folder: Path) -> dict[str, Any]:
    """Of a checkpoint of one rank, by names, with rates and constants."""
    document = load(folder / "optimizer" / f"optimizer_{WHOLE}")
    rates = load(folder / "lr_scheduler" / f"lr_scheduler_{WHOLE}")
    return {
        name: {
            **document["state"][index],
            MASTERS: document[MASTERS][name],
            "lr": document["param_groups"][index]["lr"],
            "rate": rates["base_lrs"][index],
        }
        for index, name in document["names"].items()
    }


def same_states(one: Path, other: Path) -> None:
    wanted, found = states_of(one), states_of(other)
    assert wanted.keys() == found.keys()
    for name in wanted:
        same(wanted[name], found[name], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_topology_after_any_other(family: str, made: dict[str, Path], tmp_path: Path) -> None:
    first = last = trained(family, made)
    sizes: list[dict[str, int]] = [
        {"ep": 2, "dp": 2},
        {"tp": 2, "ep": 4, "dp": 4, "zero_stage": 1},
        {"tp": 1, "pp": 2, "ep": 2, "dp": 4},
    ]
    if family == "qwen3_moe":
        sizes += [{"pp": 1, "ep": 4, "zero_stage": 0}, {"ep": 1, "dp": 3, "zero_stage": 1}]
    for number, choices in enumerate([*sizes, {"tp": 2, "pp": 1, "ep": 2, "dp": 4}]):
        reshard(last, tmp_path / str(number), **choices)
        last = tmp_path / str(number)
    assert nanotron_fast.inspect(last).warnings == nanotron_fast.inspect(first).warnings
    reshard(last, tmp_path / "back", tp=1, pp=1, dp=1, ep=1, zero_stage=0)
    same_states(first, tmp_path / "back")
    if family == "qwen3_moe":
        assert nanotron_fast.verify(first, tmp_path / "back").equal
    told = yaml.safe_load((last / "config.yaml").read_text())["parallelism"]
    assert told == {"tp": 2, "pp": 1, "dp": 4, "expert_parallel_size": 2}


def experts_in(names: Mapping[Any, str]) -> list[bool]:
    return [".experts." in name for name in names.values()]


def test_files_without_zero(made: dict[str, Path], tmp_path: Path) -> None:
    """What is not split is in the file of the first expert rank; experts each in their own."""
    source = trained("qwen3_moe", made)
    reshard(source, tmp_path / "out", ep=2, dp=4)
    folder = tmp_path / "out" / "optimizer"
    assert sorted(path.name for path in folder.glob("*.pt")) == [
        f"optimizer_pp-0-of-1_tp-0-of-1_exp-{rank}-of-2.pt" for rank in (0, 1)
    ]
    before = load(source / "optimizer" / f"optimizer_{WHOLE}")
    names = list(before["names"].values())
    for rank in (0, 1):
        document = load(folder / f"optimizer_pp-0-of-1_tp-0-of-1_exp-{rank}-of-2.pt")
        assert all(experts_in(document["names"])) is (rank == 1)
        wanted = [name for name in names if rank == 0 or ".experts." in name]
        assert sorted(document["names"].values()) == sorted(wanted)
        index = list(document["names"].values()).index(GATE_UP)
        was = before["state"][names.index(GATE_UP)]["exp_avg"]
        assert torch.equal(document["state"][index]["exp_avg"], was.chunk(2)[rank])
        assert torch.equal(document[MASTERS][GATE_UP], before[MASTERS][GATE_UP].chunk(2)[rank])
        assert len(document["param_groups"]) == len(wanted)
        name = f"lr_scheduler_pp-0-of-1_tp-0-of-1_exp-{rank}-of-2.pt"
        assert len(load(tmp_path / "out" / "lr_scheduler" / name)["base_lrs"]) == len(wanted)
    config = json.loads((folder / "optimizer_config.json").read_text())
    assert config["parallelism"]["expert_parallel_size"] == "2"


def test_files_with_zero(made: dict[str, Path], tmp_path: Path) -> None:
    """Runs of what is not split go over all data-parallel ranks, those of experts over some."""
    source = trained("qwen3_moe", made)
    reshard(source, tmp_path / "out", ep=2, dp=6, zero_stage=1)
    folder = tmp_path / "out" / "optimizer"
    before = load(source / "optimizer" / f"optimizer_{WHOLE}")
    names = list(before["names"].values())
    dense = "model.decoder.0.pp_block.attn.qkv_proj.weight"
    config = json.loads((folder / "optimizer_config.json").read_text())["configs"]
    for dp in range(6):
        path = folder / f"optimizer_pp-0-of-1_dp-{dp}-of-6_tp-0-of-1_exp-{dp % 2}-of-2.pt"
        document = load(path)
        for name, rank, ranks in ((dense, dp, 6), (GATE_UP, dp // 2, 3)):
            index = list(document["names"].values()).index(name)
            shard = before["state"][names.index(name)]["exp_avg_sq"]
            shard = shard if name == dense else shard.chunk(2)[dp % 2]
            first, end = runs_of(shard.numel(), ranks)[rank]
            assert torch.equal(document["state"][index]["exp_avg_sq"], shard.reshape(-1)[first:end])
            offsets = config["param_name_to_dp_rank_offsets"][name]
            assert offsets[str(dp)] == [str(first), str(end)]
            assert config["orig_param_shapes"][name] == [str(size) for size in shard.shape]
    assert len(list((tmp_path / "out" / "lr_scheduler").iterdir())) == 2
    for rank in (0, 1):
        name = f"lr_scheduler_pp-0-of-1_tp-0-of-1_exp-{rank}-of-2.pt"
        assert len(load(tmp_path / "out" / "lr_scheduler" / name)["base_lrs"]) == len(names)


@pytest.mark.parametrize(
    "stored",
    [
        {"ep": 2, "dp": 2},
        {"ep": 4, "dp": 8, "zero_stage": 1},
        {"tp": 2, "pp": 2, "dp": 3, "zero_stage": 1},
    ],
    ids=str,
)
def test_a_trainer_takes_states_of_any_topology(
    stored: dict[str, int], made: dict[str, Path], tmp_path: Path
) -> None:
    source = trained("qwen3_moe", made)
    reshard(source, tmp_path / "stored", **stored)
    states, wanted = StoredStates(tmp_path / "stored"), states_of(source)
    assert states.num_steps() == 7
    params = params_of(source)
    for name in (GATE_UP, "model.decoder.0.pp_block.attn.qkv_proj.weight"):
        whole = states_of_one(params[name], wanted[name]["exp_avg"])
        for ep, tp in ((1, 1), (2, 1), (4, 2)):
            for rank in range(max(ep, tp)):
                ranks = {"tp": tp, "tp_rank": rank % tp, "ep": ep, "ep_rank": rank % ep}
                shard = whole(**ranks)
                run = (shard.numel() // 3, shard.numel() - 5)
                found = states.share(name, "exp_avg", params[name], run=run, **ranks)
                assert found is not None
                assert torch.equal(found, shard[run[0] : run[1]]), (name, ranks)


def states_of_one(param: Any, whole: torch.Tensor) -> Any:
    """Cuts the whole state of a parameter in the plainest way."""

    def cut(*, tp: int, tp_rank: int, ep: int, ep_rank: int) -> torch.Tensor:
        if "ep" in param.cuts:
            return whole.chunk(ep)[ep_rank].reshape(-1)
        chunks = whole.split(param.chunks, dim=param.cuts["tp"])
        shards = [chunk.chunk(tp, dim=param.cuts["tp"])[tp_rank] for chunk in chunks]
        return torch.cat(shards, dim=param.cuts["tp"]).reshape(-1)

    return cut


def test_masters_of_experts_that_are_split(made: dict[str, Path], tmp_path: Path) -> None:
    source = trained("qwen3_moe", made)
    reshard(source, tmp_path / "split", tp=2, ep=2, dp=4, zero_stage=1)
    exported = []
    for name, folder in (("whole", source), ("split", tmp_path / "split")):
        nanotron_fast.convert(folder, tmp_path / f"{name}-hf", master_weights=True)
        exported.append(load_file(tmp_path / f"{name}-hf" / "model.safetensors"))
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_states_of_other_expert_ranks_than_the_weights(
    made: dict[str, Path], tmp_path: Path
) -> None:
    source = trained("qwen3_moe", made)
    reshard(source, tmp_path / "split", ep=2, dp=2)
    mixed = tmp_path / "mixed"
    shutil.copytree(tmp_path / "split", mixed)
    shutil.rmtree(mixed / "model")
    shutil.copytree(source / "model", mixed / "model")
    said = "its files are of tp=1 pp=1 dp=2 ep=2 .*and the weights of tp=1 pp=1 ep=1"
    with pytest.raises(CheckpointError, match=said):
        plan(mixed, tmp_path / "out")
    assert any("of tp=1 pp=1 dp=2 ep=2" in each for each in nanotron_fast.inspect(mixed).warnings)


def test_experts_that_do_not_divide(made: dict[str, Path], tmp_path: Path) -> None:
    source = trained("qwen3_moe", made)
    with pytest.raises(TopologyError, match=r"ep=2 does not divide dp=1, .*choose --dp 2, or"):
        plan(source, tmp_path / "out", ep=2)
    with pytest.raises(TopologyError, match=r"ep=2 does not divide dp=3, .*choose --dp 4, or"):
        plan(source, tmp_path / "out", ep=2, dp=3)
    with pytest.raises(TopologyError, match="4 experts do not split over ep=3"):
        plan(source, tmp_path / "out", ep=3, dp=3)
    weights = tmp_path / "weights"
    shutil.copytree(source, weights, ignore=shutil.ignore_patterns("*.pt", "optimizer"))
    assert plan(weights, tmp_path / "out", ep=2).topology == Topology(ep=2)
