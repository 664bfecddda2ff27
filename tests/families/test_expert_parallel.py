"""Experts split over ranks: whole ones, along the first dimension of their parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.errors import CheckpointError, TopologyError, UnsupportedModelError
from nanotron_fast.formats.safetensors import read_header
from tests.families.zoo import save
from tests.modelzoo import make, read_tensors

UP = "model/model/decoder/0/pp_block/mlp/experts/model_merged_gate_up_proj"


@pytest.fixture(params=["qwen3_moe"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(request.param, tmp_path / "hf", torch.bfloat16)


@pytest.mark.parametrize("source", ["qwen3_moe", "mixtral", "olmoe"], indirect=True)
@pytest.mark.parametrize("sizes", [(1, 1, 2), (2, 2, 2), (2, 1, 4)], ids=str)
def test_there_and_back(sizes: tuple[int, int, int], source: Path, tmp_path: Path) -> None:
    topology = Topology(*sizes)
    report = nf.convert(source, tmp_path / "there", topology=topology)
    assert report.plan.to_json(1)["topology"] == {
        "tp": topology.tp,
        "pp": topology.pp,
        "ep": topology.ep,
    }
    assert nf.verify(source, tmp_path / "there").equal
    assert nf.inspect(tmp_path / "there").topology == topology
    nf.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)


def test_files_say_which_experts_they_hold(source: Path, tmp_path: Path) -> None:
    nf.convert(source, tmp_path / "there", topology=Topology(tp=2, pp=1, ep=2))
    folder = (tmp_path / "there" / UP).parent
    assert sorted(path.name for path in folder.iterdir()) == [
        f"model_merged_{which}_proj_pp-rank-0-of-1_tp-rank-0-of-2_exp-rank-{rank}-of-2.safetensors"
        for which in ("down", "gate_up")
        for rank in range(2)
    ]
    header = read_header(
        folder / f"{Path(UP).name}_pp-rank-0-of-1_tp-rank-0-of-2_exp-rank-1-of-2.safetensors"
    )
    assert header.tensors["data"].shape == (2, 48, 48)
    assert header.metadata["unsharded_shape"] == "(4, 48, 48)"
    slices = header.metadata["local_global_slices_pairs"]
    everything = "None,None,None|None,None,None"
    assert slices == f"None,None,None|{everything}#2,4,None|{everything}"


def test_from_topology_to_topology(source: Path, tmp_path: Path) -> None:
    nf.convert(source, tmp_path / "two", topology=Topology(tp=2, pp=2, ep=2))
    nf.reshard(tmp_path / "two", tmp_path / "four", tp=1, pp=1, ep=4)
    nf.convert(source, tmp_path / "directly", topology=Topology(ep=4))
    names = sorted(
        path.relative_to(tmp_path / "four") for path in (tmp_path / "four").rglob("*.safetensors")
    )
    assert names == sorted(
        path.relative_to(tmp_path / "directly")
        for path in (tmp_path / "directly").rglob("*.safetensors")
    )
    for name in names:
        assert (tmp_path / "four" / name).read_bytes() == (
            tmp_path / "directly" / name
        ).read_bytes()
    nf.reshard(tmp_path / "four", tmp_path / "again", tp=2)
    assert nf.inspect(tmp_path / "again").topology == Topology(tp=2, pp=1, ep=4)
    assert nf.verify(tmp_path / "two", tmp_path / "again").equal


def test_a_rank_loads_its_experts(source: Path, tmp_path: Path) -> None:
    topology = Topology(tp=2, pp=1, ep=2)
    nf.convert(source, tmp_path / "there", topology=topology)
    nf.convert(source, tmp_path / "whole", topology=Topology(tp=2))
    shards = {}
    for path in (tmp_path / "whole" / "model").rglob("*.safetensors"):
        stem = path.name.removesuffix(".safetensors").removeprefix("model_")
        name = ".".join(
            (
                *path.parent.relative_to(tmp_path / "whole" / "model").parts,
                stem.split("_pp-rank")[0],
            )
        )
        if "_tp-rank-" not in stem or "_tp-rank-1-" in stem:
            shards[name] = read_header(path).tensors["data"]
    tensors = {}
    for name, info in shards.items():
        shape = list(info.shape)
        if "merged" in name:
            shape[0] //= 2
        dtype = torch.float32 if info.dtype == "F32" else torch.bfloat16
        tensors[name] = torch.full(shape, 7.0, dtype=dtype)
    for from_there in (tmp_path / "there", source):
        found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        nf.load_into(found, from_there, topology=topology, rank=3)
        expected = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        name = "model.decoder.0.pp_block.mlp.experts.merged_gate_up_proj"
        whole = torch.zeros(4, *expected[name].shape[1:], dtype=torch.bfloat16)
        everything = {
            **expected,
            **{
                each: torch.zeros(4, *tensor.shape[1:], dtype=tensor.dtype)
                for each, tensor in expected.items()
                if "merged" in each
            },
        }
        nf.load_into(everything, tmp_path / "whole", topology=Topology(tp=2), rank=1)
        whole = everything[name]
        assert torch.equal(found[name], whole[2:])
        assert whole.abs().max() > 0
    with pytest.raises(TopologyError, match="rank 4: TP=2 PP=1 EP=2 has ranks 0 to 3"):
        nf.load_into(tensors, source, topology=topology, rank=4)


def test_what_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="4 experts do not split over ep=3"):
        nf.plan(source, tmp_path / "out", topology=Topology(ep=3))
    dense = make("llama", num_hidden_layers=1).save(tmp_path / "dense")
    with pytest.raises(TopologyError, match="the model has no experts"):
        nf.plan(dense, tmp_path / "out", topology=Topology(ep=2))
    stock = make("qwen2_moe", num_hidden_layers=1).save(tmp_path / "stock")
    with pytest.raises(UnsupportedModelError, match="--model-class nanotron-fast writes them"):
        nf.plan(stock, tmp_path / "out", topology=Topology(ep=2))
    nf.convert(
        stock,
        tmp_path / "out",
        topology=Topology(ep=2),
        target="nanotron-fast",
        model_class="nanotron-fast",
    )
    assert nf.verify(stock, tmp_path / "out").equal
    next((tmp_path / "out" / "model").rglob("*_exp-rank-1-of-2*")).unlink()
    with pytest.raises(CheckpointError, match=r"EP ranks \[0\] of 2; \[1\] are missing"):
        nf.inspect(tmp_path / "out")
