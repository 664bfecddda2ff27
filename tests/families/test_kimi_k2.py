"""Kimi-K2 is DeepSeek-V3 by another name, of which transformers has no class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.families import family_of_config
from nanotron_fast.families.hf_config import read_config
from tests.families.zoo import save
from tests.modelzoo import read_tensors

# What the config.json of Kimi-K2 says. Its 61 layers have 70,000 tensors, of equal layers.
PUBLISHED: dict[str, Any] = {
    "model_type": "kimi_k2",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 163840,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "rope_theta": 50000.0,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
    },
}


def test_the_published_model_has_a_trillion_parameters() -> None:
    family = family_of_config(PUBLISHED)

    def count(layers: int) -> int:
        spec = read_config(family, {**PUBLISHED, "num_hidden_layers": layers})
        return sum(math.prod(each.shape) for each in family.params(spec))

    with_experts = count(3) - count(2)
    assert abs((count(2) + 59 * with_experts) / 1026.4e9 - 1) < 0.001
    params = family.params(read_config(family, {**PUBLISHED, "num_hidden_layers": 2}))
    shapes = {
        param.name: param.local_shape({"tp": 8, "pp": 4, "ep": 16})
        for param in params
        if param.block == 1
    }
    merged = "model.decoder.1.pp_block.mlp.experts.merged_gate_up_proj"
    assert shapes[merged] == (24, 7168, 4096)


def kimi(root: Path) -> Path:
    """A DeepSeek-V3's files, whose config.json says that it is a Kimi-K2."""
    save("deepseek_v3", root, torch.bfloat16)
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    return root


def test_it_converts_as_a_deepseek_v3(tmp_path: Path) -> None:
    source = kimi(tmp_path / "kimi")
    deepseek = save("deepseek_v3", tmp_path / "deepseek", torch.bfloat16)
    topology = Topology(tp=2, pp=2)
    report = nf.convert(source, tmp_path / "there", topology=topology)
    nf.convert(deepseek, tmp_path / "expected", topology=topology)
    assert report.plan.family == "kimi_k2"
    written = sorted((tmp_path / "there" / "model").rglob("*.safetensors"))
    assert written
    for path in written:
        assert (tmp_path / "expected" / path.relative_to(tmp_path / "there")).read_bytes() == (
            path.read_bytes()
        )
    nf.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    assert said["model_type"] == "kimi_k2"
    assert said["architectures"] == ["DeepseekV3ForCausalLM"]


def test_it_needs_no_side_file(tmp_path: Path) -> None:
    source = kimi(tmp_path / "kimi")
    nf.convert(source, tmp_path / "there")
    (tmp_path / "there" / "nanotron_fast.json").unlink()
    nf.convert(tmp_path / "there", tmp_path / "back")
    assert nf.verify(source, tmp_path / "back").equal
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    assert said["model_type"] == "kimi_k2"
