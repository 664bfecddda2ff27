"""Models that Nanotron would compute wrongly are refused, with the reason and the way out."""

from pathlib import Path
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast.errors import (
    ConfigError,
    UnsupportedModelError,
)
from tests.modelzoo import make
from tests.refusals import refused

LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
EXTENDED = "--target nanotron-fast admits it, and nanotron-fast train trains it"


# Family, changes to its config, the words of the refusal.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "rope-scaling": (
        "llama",
        {"rope_scaling": LLAMA3},
        "rope_scaling 'llama3': Nanotron stores rope_scaling and ignores it.*"
        "nanotron-fast run --rope-scaling",
    ),
    "rope-scaling-old-key": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling 'linear'",
    ),
    "rope-scaling-mistral": ("mistral", {"rope_scaling": LLAMA3}, "rope_scaling 'llama3'"),
    "rope-scaling-yarn": (
        "qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rope_scaling 'yarn'",
    ),
    "rope-parameters": (
        "llama",
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        "rope_scaling 'llama3'",
    ),
    "partial-rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "partial-rotary-5": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "partial_rotary_factor is 0.25",
    ),
    "rope-by-kind-of-layer": (
        "qwen2",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters differ between kinds of layers",
    ),
    "head-dim": ("llama", {"head_dim": 16}, f"head_dim 16 is not hidden_size.*64 / 8.*{EXTENDED}"),
    "head-dim-mistral": ("mistral", {"head_dim": 16}, "head_dim 16 is not hidden_size"),
    "head-dim-qwen2": ("qwen2", {"head_dim": 4}, "head_dim 4 is not hidden_size"),
    "attention-bias": (
        "llama",
        {"attention_bias": True},
        f"attention_bias puts a bias on the attention's output projection.*{EXTENDED}",
    ),
    "attention-bias-smollm3": ("smollm3", {"attention_bias": True}, "output projection"),
    "mlp-bias": ("llama", {"mlp_bias": True}, "mlp_bias: the MLP has biases"),
    "mlp-bias-smollm3": ("smollm3", {"mlp_bias": True}, "mlp_bias"),
    "experts-on-no-layer": (
        "qwen2_moe",
        {"mlp_only_layers": [0, 1, 2, 3, 4, 5]},
        r"by mlp_only_layers \[0, .*5\] and decoder_sparse_step 1 none of \d layers has experts",
    ),
    "starcoder2-no-bias": ("starcoder2", {"use_bias": False}, f"use_bias.*{EXTENDED}"),
    "starcoder2-untied": ("starcoder2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    "norm-topk-prob": ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
    "activation": ("llama", {"hidden_act": "swiglu"}, "hidden_act 'swiglu' is not one of.*silu"),
    "activation-starcoder2": ("starcoder2", {"hidden_act": "gelu_weird"}, "'gelu_weird'"),
    "window-mixture": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        "4 of 6 layers have a sliding window",
    ),
    "window-mixture-default-size": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": ..., "max_window_layers": 5},
        "1 of 6 layers have a sliding window",
    ),
    "window-mixture-by-kinds": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
        "3 of 6 layers have a sliding window",
    ),
    "window-moe": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        "use_sliding_window without layer_types: transformers 4 .* transformers 5",
    ),
    "window-smollm3": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 8},
        "2 of 6 layers have a sliding window",
    ),
    "window-and-no-rope": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention"] * 6,
        },
        "a sliding window of 8 together with layers without rotary embedding",
    ),
    "no-rope-irregular": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 1, 1, 0]},
        r"leaves rotary embeddings out of layers \[1, 5\] of 6",
    ),
    "no-rope-does-not-divide": (
        "smollm3",
        {"no_rope_layers": [1, 1, 1, 0, 1, 1]},
        r"out of layers \[3\] of 6.*n divides",
    ),
    "no-rope-default-interval": (
        "smollm3",
        {"no_rope_layers": ..., "no_rope_layer_interval": ...},
        r"layers \[3\] of 6",
    ),
    "clip-qkv": ("llama", {"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv is 8.0, and no"),
    "bloom": ("llama", {"model_type": "bloom"}, r"'bloom' is not supported.*ALiBi"),
    "phimoe": ("llama", {"model_type": "phimoe"}, "'phimoe' is not supported.*renormalises"),
    "gpt2": (
        "llama",
        {"model_type": "gpt2"},
        "'gpt2' is not supported: its positions are learned.* Supported: .*llama",
    ),
}


@pytest.mark.parametrize("style", ["full", "5"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, style: str, tmp_path: Path) -> None:
    family, changes, message = MODELS[name]
    model = make(family, **{key: value for key, value in changes.items() if value is not ...})
    for key, value in changes.items():
        if value is ...:
            del model.config[key]
    if "rope_parameters" in changes:
        style = "full"
    source = model.save(tmp_path / "source", style=style)
    refused(source, tmp_path, UnsupportedModelError, message)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rope-scaling", {}),
        ("rope-scaling-mistral", {}),
        ("rope-scaling-yarn", {}),
        ("head-dim", {}),
        ("attention-bias", {}),
        ("attention-bias-smollm3", {}),
        ("mlp-bias", {}),
        ("head-dim-qwen2", {}),
        ("head-dim-mistral", {}),
        ("starcoder2-untied", {}),
        ("window-mixture", {}),
        ("window-smollm3", {}),
        ("no-rope-irregular", {}),
    ],
)
def test_admitted_by_the_other_target(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    family, changes, _ = MODELS[name]
    source = make(family, **changes).save(tmp_path / "source")
    nanotron_fast.convert(source, tmp_path / "out", target="nanotron-fast", **options)


@pytest.mark.parametrize("name", ["window-moe", "activation", "activation-starcoder2"])
def test_not_admitted_by_the_other_target_either(name: str, tmp_path: Path) -> None:
    family, changes, message = MODELS[name]
    source = make(family, **changes).save(tmp_path / "source")
    refused(source, tmp_path, UnsupportedModelError, message, target="nanotron-fast")


@pytest.mark.parametrize(
    "changes",
    [
        {
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {"rope_parameters": ["rope_type"]},
    ],
)
def test_rope_that_two_versions_read_differently(changes: dict[str, Any], tmp_path: Path) -> None:
    model = make("llama")
    model.config.update(changes)
    model.save(tmp_path / "hf")
    with pytest.raises(ConfigError, match="rope_parameters"):
        nanotron_fast.convert(tmp_path / "hf", tmp_path / "out")
