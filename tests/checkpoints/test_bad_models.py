"""Configs without sense, and tensors that are not what the config says, are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanotron_fast
from nanotron_fast.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedModelError,
)
from tests.modelzoo import Model, Tensor, make, random_tensor
from tests.refusals import refused


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"],
)
def test_missing_sizes(key: str, tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=1)
    del model.config[key]
    source = model.save(tmp_path / "source")
    refused(source, tmp_path, ConfigError, f"config.json: {key} is missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, and should be at least 1"),
        ({"hidden_size": "64"}, "hidden_size is '64', and should be an integer"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
        ({"num_attention_heads": 7}, "hidden_size 64 does not divide by 7 heads"),
        ({"num_key_value_heads": 3}, "8 heads do not divide by 3 key-value heads"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"model_type": None}, "model_type is missing"),
    ],
)
def test_senseless_values(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=1)
    model.config.update(changes)
    refused(model.save(tmp_path / "source"), tmp_path, ConfigError, message)


def tensor_case(tmp_path: Path, family: str = "llama", **changes: Any) -> Model:
    return make(family, num_hidden_layers=2, **changes)


def test_missing_tensor(tmp_path: Path) -> None:
    model = tensor_case(tmp_path)
    del model.tensors["model.layers.1.self_attn.k_proj.weight"]
    source = model.save(tmp_path / "source")
    refused(source, tmp_path, CheckpointError, r"layers.1.self_attn.k_proj.weight is missing")


def test_missing_head(tmp_path: Path) -> None:
    model = tensor_case(tmp_path)
    del model.tensors["lm_head.weight"]
    source = model.save(tmp_path / "source")
    refused(source, tmp_path, CheckpointError, "lm_head.weight is missing")


def test_missing_expert(tmp_path: Path) -> None:
    model = tensor_case(tmp_path, "qwen2_moe")
    del model.tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    source = model.save(tmp_path / "source")
    message = "experts.3.up_proj.weight or .*experts.gate_up_proj is missing"
    refused(source, tmp_path, CheckpointError, message)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_norm.weight", "model.layers.2.input_layernorm.weight", "ghost"],
)
def test_unknown_tensor(name: str, tmp_path: Path) -> None:
    model = tensor_case(tmp_path)
    model.tensors[name] = Tensor("BF16", (8,), bytes(16))
    source = model.save(tmp_path / "source")
    message = f"1 tensors have no place in Nanotron's llama: {name}"
    refused(source, tmp_path, CheckpointError, message)


def test_many_unknown_tensors_are_counted(tmp_path: Path) -> None:
    model = tensor_case(tmp_path)
    for number in range(9):
        model.tensors[f"ghost.{number}"] = Tensor("BF16", (8,), bytes(16))
    source = model.save(tmp_path / "source")
    refused(source, tmp_path, CheckpointError, "9 tensors .*ghost.4 and 4 more")


def test_experts_both_separate_and_stacked(tmp_path: Path) -> None:
    model = tensor_case(tmp_path, "qwen2_moe")
    extra = {name: t for name, t in model.stacked().items() if name not in model.tensors}
    source = model.save(tmp_path / "source", extra=extra)
    refused(source, tmp_path, CheckpointError, "4 tensors have no place")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 32), r"\[64, 32\].*\[64, 64\]"),
        ("model.layers.1.mlp.down_proj.weight", (96, 64), r"\[96, 64\].*\[64, 96\]"),
        ("model.embed_tokens.weight", (161, 64), r"\[161, 64\].*\[160, 64\]"),
        ("model.norm.weight", (1, 64), r"\[1, 64\].*\[64\]"),
        ("model.norm.weight", (), r"\[\].*\[64\]"),
        ("lm_head.weight", (0, 64), r"\[0, 64\].*\[160, 64\]"),
    ],
)
def test_shape_that_contradicts_the_config(
    name: str, shape: tuple[int, ...], expected: str, tmp_path: Path
) -> None:
    model = tensor_case(tmp_path)
    model.tensors[name] = random_tensor(np.random.default_rng(0), "BF16", shape)
    source = model.save(tmp_path / "source")
    message = f"{name} has shape {expected.replace('.*', ', config.json calls for ')}"
    refused(source, tmp_path, CheckpointError, message)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"])
def test_quantised_dtypes(dtype: str, tmp_path: Path) -> None:
    model = tensor_case(tmp_path)
    name = "model.layers.1.self_attn.o_proj.weight"
    model.tensors[name] = Tensor(dtype, (64, 64), bytes(64 * 64))
    source = model.save(tmp_path / "source")
    message = f"{name} is {dtype}: quantised or integer weights"
    refused(source, tmp_path, UnsupportedModelError, message)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_f64_is_not_cast(dtype: str, tmp_path: Path) -> None:
    source = make("llama", dtype="F64", num_hidden_layers=1).save(tmp_path / "source")
    message = "is F64, which is not cast; use --dtype keep"
    refused(source, tmp_path, UnsupportedModelError, message, dtype=dtype)
    nanotron_fast.convert(source, tmp_path / "there")
    refused(tmp_path / "there", tmp_path, CheckpointError, message, dtype=dtype)


def test_f64_router(tmp_path: Path) -> None:
    source = make("qwen2_moe", dtype="F64", num_hidden_layers=1).save(tmp_path / "source")
    refused(source, tmp_path, UnsupportedModelError, "mlp.gate.weight is F64")


def flipped(tensor: Tensor) -> Tensor:
    data = bytearray(tensor.data)
    data[-1] ^= 1
    return tensor._replace(data=bytes(data))


def test_untrue_tie(tmp_path: Path) -> None:
    model = tensor_case(tmp_path, tie_word_embeddings=True)
    head = flipped(model.tensors["model.embed_tokens.weight"])
    source = model.save(tmp_path / "source", extra={"lm_head.weight": head})
    message = (
        "model.safetensors: tie_word_embeddings is true, but lm_head.weight differs from "
        "model.embed_tokens.weight in 1 of 10240 elements"
    )
    refused(source, tmp_path, CheckpointError, message)


def test_untrue_tie_by_shape(tmp_path: Path) -> None:
    model = tensor_case(tmp_path, tie_word_embeddings=True)
    head = Tensor("BF16", (8, 64), bytes(1024))
    source = model.save(tmp_path / "source", extra={"lm_head.weight": head})
    refused(
        source, tmp_path, CheckpointError, r"tie_word_embeddings is true, but lm_head.weight is"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_legacy_weights(name: str, tmp_path: Path) -> None:
    source = make("llama", num_hidden_layers=1).save(tmp_path / "source")
    (source / "model.safetensors").rename(source / name)
    message = f"the weights are in {name}, a pickle.*safetensors.*save_pretrained"
    refused(source, tmp_path, CheckpointError, message)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = "neither a Hugging Face checkpoint .config.json. nor a Nanotron one"
    refused(tmp_path / "empty", tmp_path, CheckpointError, message)
    refused(tmp_path / "absent", tmp_path, CheckpointError, "absent: no such directory")
    (tmp_path / "file").write_text(json.dumps({}))
    refused(tmp_path / "file", tmp_path, CheckpointError, "file: not a directory")
