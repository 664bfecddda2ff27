"""Experts that are split over ranks: what is trained is the same, however they are spread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nanotron_fast as nf
from nanotron_fast.cli.dry_run import dry_run
from nanotron_fast.errors import TopologyError, UnsupportedModelError
from nanotron_fast.train import TrainingConfig
from nanotron_fast.train.advice import advice
from nanotron_fast.train.architecture import ModelPlan, architecture
from nanotron_fast.train.config.checks import check_world_size
from nanotron_fast.train.estimate import Memory, estimate
from nanotron_fast.train.mesh import Mesh
from tests.families import zoo
from tests.modelzoo import make
from tests.parallel.ranks import run_ranks
from tests.train.configs import document, save
from tests.train.expert_ranks import train


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with what experts can have but biases: groups, a correction bias, a shared one."""
    entry = zoo.ZOO["glm4_moe"]
    changes = {**entry.changes, "num_hidden_layers": 2, "first_k_dense_replace": 0}
    monkeypatch.setitem(zoo.ZOO, "small", replace(entry, changes=changes))
    return zoo.save("small", tmp_path / "hf")


@pytest.mark.slow
def test_four_ranks_agree_with_one_process(hf: Path, tmp_path: Path) -> None:
    train(tmp_path / "one", hf)
    train(tmp_path / "muon", hf, is_muon=True)
    run_ranks("tests.train.expert_ranks", 4, str(tmp_path))


def planned(path: Path, **changes: Any) -> tuple[TrainingConfig, ModelPlan]:
    model = {"init_method": {"path": str(path)}, "dtype": "bfloat16"}
    config = TrainingConfig.from_dict(document(model=model, **changes), name="x.yaml")
    return config, architecture(config)


def layout(dp: int, ep: int) -> dict[str, Any]:
    return {"dp": dp, "pp": 1, "tp": 1, "expert_parallel_size": ep}


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    experts = zoo.save("qwen3_moe", tmp_path / "experts")
    planned(experts, parallelism=layout(4, 4))
    with pytest.raises(TopologyError, match="4 experts do not split over ep=3"):
        planned(experts, parallelism=layout(3, 3))
    dense = make("llama", num_hidden_layers=1).save(tmp_path / "dense")
    with pytest.raises(TopologyError, match=r"x\.yaml: .*expert_parallel_size is 2, .* no experts"):
        planned(dense, parallelism=layout(2, 2))
    stock = make("qwen2_moe", num_hidden_layers=1).save(tmp_path / "stock")
    with pytest.raises(UnsupportedModelError, match="train what nanotron-fast convert --target"):
        planned(stock, parallelism=layout(2, 2))
    nf.convert(stock, tmp_path / "own", target="nanotron-fast", model_class="nanotron-fast")
    planned(tmp_path / "own", parallelism=layout(2, 2))
    with pytest.raises(TopologyError, match="ep=2 does not divide dp=3"):
        Mesh.connect(dp=3, ep=2, device="cpu")
    config, _ = planned(experts, parallelism=layout(2, 2))
    with pytest.raises(TopologyError, match=r"_size=2 lies within dp\) are 2 ranks, and 4 were"):
        check_world_size(config, 4)


def test_ranks_lie_within_data_parallelism() -> None:
    """Those with the same experts are ep ranks apart."""
    device = torch.device("cpu")
    found = []
    for rank in range(8):
        mesh = Mesh(dp=4, tp=2, ep=2, rank=rank, device=device)
        found.append((mesh.edp_rank, mesh.ep_rank, mesh.tp_rank))
        assert mesh.edp == mesh.replicas(of_experts=True).size == 2
        assert mesh.replicas(of_experts=True).rank == mesh.edp_rank
        assert mesh.replicas(of_experts=False).rank == mesh.dp_rank
    assert found == [(edp, ep, tp) for edp in (0, 1) for ep in (0, 1) for tp in (0, 1)]


def test_an_estimate_counts_a_ranks_experts(tmp_path: Path) -> None:
    path = zoo.save("mixtral", tmp_path)

    def memory(dp: int, ep: int, zero: int) -> Memory:
        return estimate(
            *planned(path, parallelism=layout(dp, ep), optimizer__zero_stage=zero)
        ).memory

    model = planned(path)[1]
    counts = [torch.Size(each.shape).numel() for each in model.params if "ep" in each.cuts]
    assert len(counts) == 2 * len(model.architecture.spec.layers) == 2 * 4
    split = sum(counts)
    plain, halves = memory(4, 1, 0), memory(4, 2, 0)
    assert plain.weights - halves.weights == 2 * split // 2
    assert plain.moments - halves.moments == 8 * split // 2
    # The two ranks with the same experts share out half as much as four did with all.
    shared = memory(4, 2, 1)
    assert shared.weights == halves.weights
    assert shared.moments == memory(4, 1, 1).moments
    # Experts that no other rank has are whole, so those of two of the four layers are not gathered.
    alone, by_rows = memory(4, 4, 3), memory(4, 1, 3)
    assert alone.moments == by_rows.moments
    assert alone.weights == by_rows.weights + 2 * split // 4 - 2 * split * 2 // 4
    # What travels is counted beside what is computed with.
    assert halves.activations > plain.activations


def test_advice_splits_experts(tmp_path: Path) -> None:
    config, model = planned(
        zoo.save("mixtral", tmp_path), parallelism=layout(4, 1), optimizer__zero_stage=1
    )
    needed = estimate(config, model).memory.total
    changed = estimate(*planned(tmp_path, parallelism=layout(4, 2), optimizer__zero_stage=1))
    assert changed.memory.total < needed
    lines = advice(config, model, changed.memory.total)
    assert any("--parallelism.expert_parallel_size=2 (4 ranks)" in line for line in lines), lines
    model_of = {"init_method": {"path": str(tmp_path)}}
    path = save(tmp_path / "c.yaml", model=model_of, parallelism=layout(4, 2))
    assert "dp=4 pp=1 tp=1 ep=2" in "\n".join(dry_run(path).lines())
