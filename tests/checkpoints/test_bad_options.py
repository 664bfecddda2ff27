"""Topologies and options that do not fit the model are refused; nothing is left behind."""

from pathlib import Path
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast import Topology
from nanotron_fast.errors import (
    ConfigError,
    TopologyError,
    UnsupportedModelError,
)
from tests.modelzoo import make
from tests.refusals import refused

LLAMA3 = {"rope_type": "llama3", "factor": 8.0}

# Family, changes, topology, the words of the refusal.
TOPOLOGIES: list[tuple[str, dict[str, Any], Topology, str]] = [
    ("llama", {}, Topology(tp=8), r"qkv_proj.weight: 4 kv heads do not split over tp=8"),
    ("llama", {}, Topology(tp=3), r"do not split over tp=3"),
    ("llama", {"num_key_value_heads": 2}, Topology(tp=4), "2 kv heads do not split over tp=4"),
    (
        "llama",
        {"num_attention_heads": 2, "num_key_value_heads": 2},
        Topology(tp=4),
        "qkv_proj.weight: 2 heads do not split over tp=4",
    ),
    (
        "llama",
        {"vocab_size": 161},
        Topology(tp=2),
        r"token_embedding.weight: 161 rows of the vocabulary .* tp=2; --pad-vocab-to-multiple-of",
    ),
    ("llama", {"intermediate_size": 98}, Topology(tp=4), r"98 rows .* do not split over tp=4"),
    (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 42},
        Topology(tp=4),
        "shared_expert.gate_up_proj.weight: 42",
    ),
    ("starcoder2", {"num_key_value_heads": 1}, Topology(tp=2), "1 kv heads do not split"),
    ("qwen2", {"num_key_value_heads": 1}, Topology(tp=2), "1 kv heads do not split"),
    ("llama", {}, Topology(pp=12), r"pp=12: 6 layers fill \d+ stages"),
    ("llama", {"num_hidden_layers": 1}, Topology(pp=8), r"pp=8: 1 layers fill \d stages"),
    ("llama", {"num_hidden_layers": 1}, Topology(pp=6), "so stage 5 would own no block"),
    ("starcoder2", {}, Topology(pp=12), "pp=12: 6 layers fill"),
]


@pytest.mark.parametrize(("family", "changes", "topology", "message"), TOPOLOGIES)
def test_topologies(
    family: str, changes: dict[str, Any], topology: Topology, message: str, tmp_path: Path
) -> None:
    source = make(family, **changes).save(tmp_path / "source")
    refused(source, tmp_path, TopologyError, message, topology=topology)


@pytest.mark.parametrize(
    "sizes", [{"ep": 0}, {"tp": 0}, {"pp": -1}, {"tp": True}, {"tp": 1.0}, {"pp": "2"}]
)
def test_sizes_of_groups(sizes: dict[str, Any]) -> None:
    ((name, size),) = sizes.items()
    with pytest.raises(TopologyError, match=f"{name}={size!r}: "):
        Topology(**sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "dtype 'fp8': choose keep, bf16, fp16 or fp32"),
        ({"model_class": "gpt"}, "--model-class gpt: choose auto, llama"),
        ({"family": "gpt"}, "--family gpt: choose one of .*llama, mistral"),
        ({"target": "megatron"}, "--target megatron: choose nanotron or nanotron-fast"),
        ({"checkpoint_version": "1.4"}, "--checkpoint-version 1.4: choose 1.5 or 1.2"),
        ({"to": "hf"}, "--to hf: .* is a Hugging Face checkpoint already"),
        ({"to": "onnx"}, "--to onnx: choose nanotron or hf"),
        ({"workers": 0}, "--workers 0: it should be at least 1"),
        ({"pad_vocab_to_multiple_of": 2**62}, "--pad-vocab-to-multiple-of .*at most"),
        ({"pad_vocab_to_multiple_of": 0}, "--pad-vocab-to-multiple-of 0"),
        ({"vocab_size": 10}, "--vocab-size: it has no meaning when writing a Nanotron"),
        ({"vocab_size": -1}, "--vocab-size -1"),
        ({"max_shard_size": "5GB"}, "--max-shard-size: it has no meaning"),
        ({"max_shard_size": "big"}, "--max-shard-size big: write it like 5GB"),
        ({"max_shard_size": "nan"}, "--max-shard-size nan"),
        ({"max_shard_size": "inf"}, "--max-shard-size inf"),
        ({"max_shard_size": 0}, "--max-shard-size 0"),
    ],
)
def test_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = make("llama", num_hidden_layers=1).save(tmp_path / "source")
    refused(source, tmp_path, ConfigError, message, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": Topology(tp=2)}, "--tp: it has no meaning when writing a Hugging Face"),
        ({"topology": Topology(pp=2)}, "--pp: it has no meaning"),
        ({"model_class": "qwen2"}, "--model-class: it has no meaning"),
        ({"pad_vocab_to_multiple_of": 8}, "--pad-vocab-to-multiple-of: it has no meaning"),
    ],
)
def test_options_of_the_way_back(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = make("llama", num_hidden_layers=1).save(tmp_path / "source")
    nanotron_fast.convert(source, tmp_path / "there")
    refused(tmp_path / "there", tmp_path, ConfigError, message, **options)


@pytest.mark.parametrize(
    ("family", "changes", "options", "message"),
    [
        ("mistral", {"sliding_window": 8}, {"model_class": "llama"}, "LlamaConfig"),
        ("qwen2", {}, {"model_class": "llama"}, "LlamaConfig cannot hold a qwen2 model"),
        ("llama", {}, {"model_class": "starcoder2"}, "cannot hold a llama"),
        ("starcoder2", {}, {"model_class": "qwen2"}, "cannot hold a starcoder2"),
        ("starcoder2", {}, {"rope_interleaved": True}, "--rope-interleaved"),
        (
            "llama",
            {},
            {"checkpoint_version": "1.2", "rope_interleaved": False},
            "--no-rope-interleaved: checkpoint version 1.2",
        ),
        ("llama", {"rope_theta": 5e5}, {"checkpoint_version": "1.2"}, "rope_theta 500000"),
        ("qwen2", {}, {"checkpoint_version": "1.2"}, "version 1.2 .* has no Qwen2Config"),
        (
            "llama",
            {"rope_scaling": LLAMA3, "attention_bias": True},
            {"model_class": "qwen2", "target": "nanotron-fast"},
            "output projection",
        ),
    ],
)
def test_options_that_do_not_fit_the_model(
    family: str,
    changes: dict[str, Any],
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    source = make(family, **changes).save(tmp_path / "source")
    refused(source, tmp_path, UnsupportedModelError, message, **options)
