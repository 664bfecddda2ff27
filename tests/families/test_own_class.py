"""This package's own class, for the models that none of Nanotron's can hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.errors import CheckpointError, ConfigError, UnsupportedModelError
from nanotron_fast.formats.nanotron.classes import (
    LLAMA_CONFIG,
    NANOTRON_FAST_CONFIG,
    QWEN2_CONFIG,
    class_of,
)
from nanotron_fast.model.needs import needs
from nanotron_fast.model.spec import Attention, Dense, Experts, Latent, Layer, ModelSpec
from tests.modelzoo import make, read_tensors

LINEAR = {"rope_type": "linear", "factor": 2.0}
WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "head-dim": ("llama", {"head_dim": 12}),
    "wide": ("llama", {"head_dim": 16, "num_key_value_heads": 2}),
    "biases": ("llama", {"attention_bias": True}),
    "MLP biases": ("llama", {"mlp_bias": True}),
    "all of it": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "windows on some layers": ("qwen2", WINDOWS),
    "no regular NoPE": ("smollm3", {"no_rope_layers": [0, 1]}),
    "a mistral's head_dim": ("mistral", {"head_dim": 12}),
    "untied starcoder2": ("starcoder2", {"tie_word_embeddings": False}),
    "starcoder2 without biases": ("starcoder2", {"use_bias": False}),
}
# What ModelSpec can say, and no family's table yet.
RICH = ModelSpec(
    hidden_size=64,
    layers=(
        Layer(Attention(4, 2, 16, (0, 8), window=32, qk_norm="head"), Dense(96)),
        Layer(Attention(4, 2, 16, (0, 8), window=32, qk_norm="head"), Dense(96)),
        Layer(
            Attention(4, 4, 24, (16, 24), qk_norm="apart", latent=Latent(None, 8, 16)),
            Dense(96),
            "parallel",
        ),
        Layer(
            Attention(
                8,
                8,
                8,
                None,
                qk_norm="whole",
                scale=0.5,
                softcap=50.0,
                rope_theta=1e4,
                has_sinks=True,
            ),
            Experts(
                *(4, 2, 16, 0),
                has_shared_expert=False,
                has_shared_gate=False,
                scoring="sigmoid",
                is_renormalised=True,
                scale=2.5,
                has_correction_bias=True,
                num_groups=2,
                top_k_groups=1,
                has_bias=True,
                clamped_glu=(1.5, 7.0),
            ),
            "around",
        ),
    ),
    intermediate_size=96,
    vocab_size=128,
    max_position_embeddings=64,
    hidden_act="xielu",
    norm_eps=1e-6,
    initializer_range=0.02,
    rope_theta=5e5,
    tie_word_embeddings=True,
    norm_adds_one=True,
    embedding_scale=8.0,
    residual_scale=0.5,
    logit_scale=0.25,
    logit_softcap=30.0,
    rope_scaling=LINEAR,
    router_aux_loss_coef=0.5,
    eos_token_id=[3, 4],
)


def converted(
    tmp_path: Path, family: str, changes: dict[str, Any], **choices: Any
) -> tuple[Any, Path, Any]:
    """A model, what it was converted to, without the side file, and its model_config.json."""
    model = make(family, num_hidden_layers=2, **changes)
    source = model.save(tmp_path / "hf")
    report = nf.convert(source, tmp_path / "there", target="nanotron-fast", **choices)
    (tmp_path / "there" / "nanotron_fast.json").unlink()
    config = json.loads((tmp_path / "there" / "model_config.json").read_text())
    return model, tmp_path / "there", (config, report.plan)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_by_model_config_alone(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    model, there, (config, plan) = converted(tmp_path, family, changes, topology=Topology(tp=2))
    assert class_of(config) is NANOTRON_FAST_CONFIG
    assert config["family"] == family
    assert "is_llama_config" not in config
    document = yaml.safe_load((there / "config.yaml").read_text())
    assert document["model"]["model_config"] == config
    [told] = [each for each in plan.warnings if "which stock Nanotron refuses" in each]
    assert "nanotron-fast train trains it" in told
    # The fields are enough: neither side file nor option.
    report = nf.convert(there, tmp_path / "back")
    assert read_tensors(tmp_path / "back") == model.tensors
    assert report.plan.spec.layers == plan.spec.layers
    assert nf.verify(tmp_path / "hf", tmp_path / "back").equal
    assert nf.verify(tmp_path / "hf", there, logits=True).equal


@pytest.mark.parametrize("name", MODELS)
def test_stock_nanotron_is_not_given_such_a_model(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    source = make(family, num_hidden_layers=2, **changes).save(tmp_path / "hf")
    with pytest.raises(UnsupportedModelError, match="--target nanotron-fast admits it"):
        nf.plan(source, tmp_path / "there")


def test_a_llama_with_rope_scaling_alone_stays_a_plain_llama(tmp_path: Path) -> None:
    _, _, (config, plan) = converted(tmp_path, "llama", {"rope_scaling": LINEAR})
    assert list(config) == list(LLAMA_CONFIG.fields)
    assert any("nanotron-fast run --rope-scaling" in warning for warning in plan.warnings)


@pytest.mark.parametrize(("family", "stock"), [("llama", LLAMA_CONFIG), ("qwen2", QWEN2_CONFIG)])
def test_what_stock_holds_stays_stock(family: str, stock: Any, tmp_path: Path) -> None:
    _, _, (config, plan) = converted(tmp_path, family, {})
    assert list(config) == list(stock.fields)
    assert plan.warnings == ()


def test_it_can_be_asked_for(tmp_path: Path) -> None:
    _, there, (config, _) = converted(tmp_path, "llama", {}, model_class="nanotron-fast")
    assert class_of(config) is NANOTRON_FAST_CONFIG
    assert nf.verify(tmp_path / "hf", there).equal
    with pytest.raises(UnsupportedModelError, match="it goes with --target nanotron-fast"):
        nf.plan(tmp_path / "hf", tmp_path / "x", model_class="nanotron-fast")


def test_nanotron_0_4_has_no_such_class(tmp_path: Path) -> None:
    source = make("llama", num_hidden_layers=2, head_dim=12).save(tmp_path / "hf")
    with pytest.raises(UnsupportedModelError, match="has no NanotronFastConfig"):
        nf.plan(source, tmp_path / "x", target="nanotron-fast", checkpoint_version="1.2")


def test_every_field_of_a_spec_comes_back() -> None:
    config = NANOTRON_FAST_CONFIG.write(RICH, family="llama", version="1.5", rope_interleaved=False)
    assert [run["count"] for run in config["layers"]] == [2, 1, 1]
    assert NANOTRON_FAST_CONFIG.read(json.loads(json.dumps(config))) == RICH
    lacks = {"qk_norm", "sliding_window", "some_windows", "partial_rotary", "unlike_layers", "moe"}
    assert lacks <= {*needs(RICH)}
    other = replace(RICH, norm="layer_norm", rope_scaling=None, router_aux_loss_coef=None)
    config = NANOTRON_FAST_CONFIG.write(
        other, family="llama", version="1.5", rope_interleaved=False
    )
    assert NANOTRON_FAST_CONFIG.read(config) == other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, "layers is .*, and should be a list of layers"),
        ({"layers": [3]}, r"layers\[0\] is 3, and should be an object"),
        (
            {"layers": [{"count": 20_000, "attention": {}, "mlp": {}, "norms": "before"}]},
            "count is 20000, and should be at most 10000",
        ),
        ({"layers": [{"count": 1, "mlp": {}}]}, r"layers\[0\]: attention is missing"),
        ({"norm": "batch_norm"}, "norm is 'batch_norm'"),
        ({"family": "gpt"}, "family is 'gpt', and should be one of .*llama"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_a_config_that_makes_no_sense(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, there, (config, _) = converted(tmp_path, "llama", {"head_dim": 12})
    (there / "model_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError, match=message):
        nf.convert(there, tmp_path / "back")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("attention", {"num_kv_heads": 3}, "a divisor of the 8 heads"),
        ("attention", {"rotary": [0, 5]}, "two numbers up to 12, an even number apart"),
        ("attention", {"window": 0}, "window is 0, and should be at least 1"),
        ("attention", {"windows": 8}, r"layers\[0\].attention: windows is not known"),
        ("mlp", {"moe_router_score_function": "sigmoid"}, "mlp: moe_router_score_.* is not known"),
        ("mlp", {"kind": "sparse"}, "dense or experts"),
        ("mlp", {"has_bias": 1}, "has_bias is 1, and should be true or false"),
    ],
)
def test_a_layer_that_makes_no_sense(
    part: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, there, (config, _) = converted(tmp_path, "llama", {"head_dim": 12})
    config["layers"][0][part].update(changes)
    (there / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        nf.convert(there, tmp_path / "back")


@pytest.mark.parametrize("key", ["rotary", "window", "qk_norm"])
def test_a_layer_says_everything(key: str, tmp_path: Path) -> None:
    """What is left out would be taken for something that the model does not compute."""
    _, there, (config, _) = converted(tmp_path, "llama", {"head_dim": 12})
    del config["layers"][0]["attention"][key]
    (there / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"layers\[0\].attention: {key} is missing"):
        nf.convert(there, tmp_path / "back")


def test_the_family_is_read_beside_a_side_file_too(tmp_path: Path) -> None:
    source = make("llama", num_hidden_layers=2, head_dim=12).save(tmp_path / "hf")
    nf.convert(source, tmp_path / "there", target="nanotron-fast")
    path = tmp_path / "there" / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "family": 17}))
    with pytest.raises(ConfigError, match="family is 17, and should be one of"):
        nf.convert(tmp_path / "there", tmp_path / "back")


def test_many_experts_are_counted_before_they_are_planned(tmp_path: Path) -> None:
    _, there, (config, _) = converted(tmp_path, "qwen2_moe", {}, model_class="nanotron-fast")
    few, many = (json.loads(json.dumps(config["layers"][-1])) for _ in range(2))
    few["count"], few["mlp"]["num_experts"], few["mlp"]["top_k"] = 1, 1, 1
    many["count"], many["mlp"]["num_experts"] = 1, 10_000
    (there / "model_config.json").write_text(json.dumps({**config, "layers": [few, many]}))
    with pytest.raises(CheckpointError, match="calls for 10,000 experts in 2 layers"):
        nf.plan(there, tmp_path / "x", to="nanotron")


def test_windows_on_layers_without_rotary_embedding(tmp_path: Path) -> None:
    changes = {
        "no_rope_layers": [1, 0],
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention"] * 2,
    }
    _, there, (config, plan) = converted(tmp_path, "smollm3", changes)
    assert class_of(config) is NANOTRON_FAST_CONFIG
    assert plan.spec.sliding_window == 4
    assert nf.verify(tmp_path / "hf", there, logits=True).equal


def test_a_layer_that_differs_is_named(tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=2, head_dim=12)
    nf.convert(model.save(tmp_path / "hf"), tmp_path / "there", target="nanotron-fast")
    path = tmp_path / "there" / "model_config.json"
    config = json.loads(path.read_text())
    first, second = (json.loads(json.dumps(config["layers"][0])) for _ in range(2))
    first["count"] = second["count"] = 1
    second["attention"]["rotary"] = [0, 6]
    path.write_text(json.dumps({**config, "layers": [first, second]}))
    result = nf.verify(tmp_path / "hf", tmp_path / "there")
    assert "rotary of layer 1" in str(result.to_json()["differing"])


def test_sizes_that_the_tensors_contradict(tmp_path: Path) -> None:
    _, there, (config, _) = converted(tmp_path, "llama", {"head_dim": 12})
    config["layers"][0]["attention"].update(head_dim=16, rotary=[0, 16])
    (there / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"calls for \[256, 64\]"):
        nf.convert(there, tmp_path / "back")
