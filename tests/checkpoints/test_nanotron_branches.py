"""Checkpoints of Nanotron's own branches: fields that main lacks, and main's that they lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.cli.reporting import report_lines
from nanotron_fast.errors import ConfigError, UnsupportedModelError
from tests.modelzoo import make, read_tensors

LACKED = ("moe_intermediate_size", "shared_expert_intermediate_size", "router_aux_loss_coef")
EXTRA = {"hybrid_loss_weight": 0.5, "_return_attn_probs": True}
EXTRA_MOE = {"use_torch_permute": True, "z_loss_coeff": None}


def of_a_branch(
    tmp_path: Path, family: str, drop: tuple[str, ...] = (), extra: Any = None, moe: Any = None
) -> tuple[Any, Path]:
    """A model, and a checkpoint of it as a branch saves it."""
    changes = {"num_hidden_layers": 2, "mlp_only_layers": [0]} if family == "qwen2_moe" else {}
    model = make(family, **changes)
    there = tmp_path / "there"
    nf.convert(model.save(tmp_path / "hf"), there, topology=Topology(tp=2))
    (there / "nanotron_fast.json").unlink()
    path = there / "model_config.json"
    config = {**json.loads(path.read_text()), **(extra or {})}
    if config.get("moe_config"):
        inner = {**config["moe_config"], **(moe or {})}
        config["moe_config"] = {key: inner[key] for key in inner if key not in drop}
    path.write_text(json.dumps(config))
    return model, there


@pytest.mark.parametrize("drop", [LACKED, (*LACKED, "num_experts", "enable_shared_expert")])
def test_sizes_follow_from_the_shapes(drop: tuple[str, ...], tmp_path: Path) -> None:
    model, there = of_a_branch(tmp_path, "qwen2_moe", drop)
    nf.convert(there, tmp_path / "back")
    assert read_tensors(tmp_path / "back") == model.tensors
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    for key in ("num_experts", *LACKED[:2]):
        assert config[key] == model.config[key]
    assert nf.verify(tmp_path / "hf", there).equal
    assert nf.inspect(there).problem is None


def test_unknown_fields_go_along(tmp_path: Path) -> None:
    model, there = of_a_branch(tmp_path, "qwen2_moe", LACKED, EXTRA, EXTRA_MOE)
    report = nf.convert(there, tmp_path / "back")
    warning = report.plan.warnings[0]
    for name in (*EXTRA, "moe_config.use_torch_permute", "moe_config.z_loss_coeff"):
        assert name in warning
    assert read_tensors(tmp_path / "back") == model.tensors
    # Again to Nanotron: they are in model_config.json, which says so, and not in the strict yaml.
    report = nf.convert(tmp_path / "back", tmp_path / "again")
    assert "hybrid_loss_weight" in report.plan.warnings[0]
    config = json.loads((tmp_path / "again" / "model_config.json").read_text())
    assert {key: config[key] for key in EXTRA} == EXTRA
    assert {key: config["moe_config"][key] for key in EXTRA_MOE} == EXTRA_MOE
    assert config["moe_config"]["moe_intermediate_size"] == 24
    assert "hybrid_loss_weight" not in (tmp_path / "again" / "config.yaml").read_text()
    # And back through the side file.
    nf.convert(tmp_path / "again", tmp_path / "last")
    for name in ("back", "last"):
        kept = json.loads((tmp_path / name / "config.json").read_text())["nanotron_model_config"]
        assert kept == {**EXTRA, "moe_config": EXTRA_MOE}


def test_kept_fields_decide_nothing_that_main_knows(tmp_path: Path) -> None:
    model = make("qwen2", num_hidden_layers=2)
    kept = {"is_llama_config": True, "head_dim": 32, "rope_theta": 1.0, "of_a_branch": 1}
    model.config["nanotron_model_config"] = kept
    report = nf.convert(model.save(tmp_path / "hf"), tmp_path / "there")
    config = json.loads((tmp_path / "there" / "model_config.json").read_text())
    assert config["of_a_branch"] == 1
    assert config["rope_theta"] == 1e6
    assert not {"is_llama_config", "head_dim"} & set(config)
    assert "of_a_branch of the branch" in report.plan.warnings[0]
    nf.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == model.tensors
    model.config["nanotron_model_config"] = []
    with pytest.raises(ConfigError, match=r"nanotron_model_config is \[\], and should be"):
        nf.plan(model.save(tmp_path / "hf"), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "extra", "moe", "name"),
    [
        ("llama", {"interleaved_rotary": True}, None, "interleaved_rotary is True"),
        ("llama", {"kv_lora_rank": 16}, None, "kv_lora_rank is 16"),
        ("llama", {"final_logit_softcapping": 30.0}, None, "final_logit_softcapping is 30.0"),
        (
            "qwen2_moe",
            None,
            {"moe_router_score_function": "sigmoid"},
            "moe_config.moe_router_score_function is 'sigmoid'",
        ),
    ],
)
def test_fields_that_compute_otherwise_are_refused(
    family: str, extra: Any, moe: Any, name: str, tmp_path: Path
) -> None:
    _, there = of_a_branch(tmp_path, family, (), extra, moe)
    with pytest.raises(UnsupportedModelError, match=f"model_config.json: {name}"):
        nf.convert(there, tmp_path / "back")


def test_the_topology_is_said_where_it_belongs(tmp_path: Path) -> None:
    source = make("llama", num_hidden_layers=2).save(tmp_path / "hf")
    there = nf.convert(source, tmp_path / "there", topology=Topology(tp=2, pp=2))
    first = next(report_lines(there))
    assert first.startswith("llama, ")
    assert first.endswith(f" parameters, TP=2 PP=2 -> {tmp_path / 'there'}")
    back = nf.convert(tmp_path / "there", tmp_path / "back")
    ending = f" parameters, {tmp_path / 'there'} (TP=2 PP=2) -> {tmp_path / 'back'}"
    assert next(report_lines(back)).endswith(ending)
