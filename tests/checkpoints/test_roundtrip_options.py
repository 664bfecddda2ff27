"""The way there and back with each option: padding, interleaved pairs, versions, targets, casts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanotron_fast
from nanotron_fast import Topology
from tests import modelzoo
from tests.modelzoo import FAMILIES, Model, make, read_tensors
from tests.roundtrip import read_json, there_and_back

LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "starcoder2"])
@pytest.mark.parametrize("multiple", [1, 64, 100, 512])
def test_vocabulary_padding(family: str, multiple: int, tmp_path: Path) -> None:
    model = make(family, vocab_size=150)
    tp = 2
    padded = -(-150 // multiple) * multiple
    back = there_and_back(
        model.save(tmp_path / "source"),
        tmp_path,
        topology=Topology(tp=tp),
        pad_vocab_to_multiple_of=multiple,
    )
    assert read_tensors(back) == model.tensors
    assert read_json(back / "config.json")["vocab_size"] == 150
    assert read_json(tmp_path / "there" / "model_config.json")["vocab_size"] == padded
    embedding = b"".join(
        modelzoo.read_file(path)[0]["data"].data
        for path in sorted((tmp_path / "there").rglob("token_embedding/*"))
    )
    original = model.tensors["model.embed_tokens.weight"].data
    assert embedding == original + bytes((padded - 150) * 64 * 2)


def test_vocabulary_padding_that_makes_it_divide(tmp_path: Path) -> None:
    model = make("llama", vocab_size=149)
    back = there_and_back(
        model.save(tmp_path / "source"),
        tmp_path,
        topology=Topology(tp=4),
        pad_vocab_to_multiple_of=4,
    )
    assert read_tensors(back) == model.tensors


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "smollm3", "qwen2_moe"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_interleaved_rope(family: str, tp: int, tmp_path: Path) -> None:
    model = make(family)
    back = there_and_back(
        model.save(tmp_path / "source"),
        tmp_path,
        topology=Topology(tp=tp),
        rope_interleaved=True,
    )
    assert read_tensors(back) == model.tensors
    assert read_json(tmp_path / "there" / "model_config.json")["rope_interleaved"] is True
    check_interleaved_query(model, tmp_path / "there", tp)


def check_interleaved_query(model: Model, root: Path, tp: int) -> None:
    """Nanotron's row 2i of a head is row i of Hugging Face's, 2i + 1 is row i + d/2."""
    folder = root / "model/model/decoder/1/pp_block/attn/qkv_proj"
    name = f"model_weight_pp-rank-0-of-1_tp-rank-{tp - 1}-of-{tp}.safetensors"
    packed = np.frombuffer(modelzoo.read_file(folder / name)[0]["data"].data, "<u2")
    packed = packed.reshape(-1, 64)

    def heads(kind: str) -> Any:
        data = model.tensors[f"model.layers.1.self_attn.{kind}_proj.weight"].data
        return np.frombuffer(data, "<u2").reshape(-1, 2, 4, 64)

    for kind, count, first in (("q", 8 // tp, 0), ("k", 4 // tp, 64 // tp)):
        expected = heads(kind)[-count:].swapaxes(1, 2).reshape(-1, 64)
        assert np.array_equal(packed[first : first + len(expected)], expected)
    values = heads("v")[-4 // tp :].reshape(-1, 64)
    assert np.array_equal(packed[-len(values) :], values)


@pytest.mark.parametrize("family", ["llama", "mistral", "starcoder2"])
def test_checkpoint_version_1_2(family: str, tmp_path: Path) -> None:
    """It has fewer fields, and a llama in it is interleaved without saying so."""
    model = make(family)
    source = model.save(tmp_path / "source")
    back = there_and_back(source, tmp_path, topology=Topology(tp=2), checkpoint_version="1.2")
    assert read_tensors(back) == model.tensors
    config = read_json(tmp_path / "there" / "model_config.json")
    assert not {"rope_interleaved", "attention_bias", "_attn_implementation"} & set(config)
    assert read_json(tmp_path / "there" / "checkpoint_metadata.json")["version"] == "1.2"
    for path in (tmp_path / "there").rglob("*_tp-rank-*"):
        assert (modelzoo.read_file(path)[1] or {})["version"] == "1.2"
    if family != "starcoder2":
        check_interleaved_query(model, tmp_path / "there", 2)


EXTENDED = {
    "rope-scaling": {"rope_scaling": LLAMA3_ROPE},
    "biases": {"attention_bias": True},
    "wide-heads": {"head_dim": 12},
    "all": {"rope_scaling": LLAMA3_ROPE, "attention_bias": True, "head_dim": 6},
}


@pytest.mark.parametrize("style", ["full", "4", "5"])
@pytest.mark.parametrize("name", EXTENDED)
def test_target_nanotron_fast(name: str, style: str, tmp_path: Path) -> None:
    model = make("llama", **EXTENDED[name])
    source = model.save(tmp_path / "source", style=style)
    back = there_and_back(source, tmp_path, topology=Topology(tp=2, pp=2), target="nanotron-fast")
    assert read_tensors(back) == model.tensors
    config = read_json(tmp_path / "there" / "model_config.json")
    assert config["rope_scaling"] == model.config["rope_scaling"]
    assert read_json(back / "config.json") == read_json(source / "config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_only_the_side_file_keeps(family: str, tmp_path: Path) -> None:
    """Lists of token ids, dropout rates, keys that we do not know, generation_config."""
    model = make(family, eos_token_id=[5, 6, 7], bos_token_id=None, a_key_of_their_own=[1, {}])
    model.generation_config = {"temperature": 0.6, "eos_token_id": [5, 6]}
    model.tokenizer = {"tokenizer.json": b"{}\n", "tokenizer_config.json": b'{"a": 1}'}
    source = model.save(tmp_path / "source")
    back = there_and_back(source, tmp_path, topology=Topology(tp=2))
    assert read_json(back / "config.json") == read_json(source / "config.json")
    assert read_json(back / "generation_config.json") == model.generation_config
    for name, data in model.tokenizer.items():
        assert (tmp_path / "there" / name).read_bytes() == data
        assert (back / name).read_bytes() == data
    assert read_json(tmp_path / "there" / "model_config.json")["eos_token_id"] == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_casts(family: str, tmp_path: Path) -> None:
    """To fp32 and back to bf16 is the identity; a router is fp32 in Nanotron either way."""
    model = make(family)
    source = model.save(tmp_path / "source")
    nanotron_fast.convert(source, tmp_path / "wide", dtype="fp32", topology=Topology(tp=2))
    for path in (tmp_path / "wide").rglob("*.safetensors"):
        assert modelzoo.read_file(path)[0]["data"].dtype == "F32"
    nanotron_fast.convert(tmp_path / "wide", tmp_path / "back", dtype="bf16")
    assert read_tensors(tmp_path / "back") == model.tensors
    nanotron_fast.convert(source, tmp_path / "kept", dtype="bf16")
    dtypes = {
        path.parent.name: modelzoo.read_file(path)[0]["data"].dtype
        for path in (tmp_path / "kept").rglob("*.safetensors")
    }
    assert {name for name, dtype in dtypes.items() if dtype == "F32"} <= {"router"}
    assert (family == "qwen2_moe") == ("F32" in dtypes.values())


def test_a_router_takes_the_dtype_that_its_model_was_cast_to(tmp_path: Path) -> None:
    make("qwen2_moe").save(tmp_path / "hf")
    back = there_and_back(tmp_path / "hf", tmp_path, dtype="fp16")
    assert {tensor.dtype for tensor in read_tensors(back).values()} == {"F16"}
