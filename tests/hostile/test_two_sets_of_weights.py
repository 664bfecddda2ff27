"""Folders whose weights are there twice: what transformers loads, or a refusal."""

import json
from pathlib import Path

import numpy as np
import pytest

import nanotron_fast
from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.huggingface import checkpoint
from nanotron_fast.formats.huggingface.checkpoint import read_hf
from tests.modelzoo import Model, make, random_tensor, read_file, read_tensors, write_json
from tests.refusals import refused

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = "model-00001-of-00002.safetensors"


def model(seed: int = 0) -> Model:
    return make("llama", num_hidden_layers=1, seed=seed)


def both(tmp_path: Path, single: Model, sharded: Model) -> Path:
    source = single.save(tmp_path / "source")
    return sharded.save(source, shards=2)


def test_other_weights_in_the_shards_are_refused(tmp_path: Path) -> None:
    source = both(tmp_path, model(1), model(2))
    message = f"twice, in {SINGLE} and in the shards of {INDEX}.*transformers loads {SINGLE}"
    refused(source, tmp_path, CheckpointError, message)


def test_transformers_loads_the_single_file(tmp_path: Path) -> None:
    """What the message says of transformers is so in the version that is installed."""
    transformers = pytest.importorskip("transformers")
    source = both(tmp_path, model(1), model(2))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    data = loaded.model.norm.weight.detach().view(dtype=__import__("torch").uint8)
    assert data.numpy().tobytes() == model(1).tensors["model.norm.weight"].data


def test_equal_weights_are_fine(tmp_path: Path) -> None:
    source = both(tmp_path, model(), model())
    report = nanotron_fast.convert(source, tmp_path / "there")
    assert report.plan.warnings == ()
    nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == model().tensors
    assert nanotron_fast.verify(source, tmp_path / "there").equal


@pytest.mark.parametrize("place", ["first", "last"])
def test_one_other_byte_is_seen(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first block of a tensor and in the last, which is a short one."""
    monkeypatch.setattr(checkpoint, "_BLOCK_BYTES", 1000)
    other = model()
    tensor = other.tensors["lm_head.weight"]
    data = bytearray(tensor.data)
    data[0 if place == "first" else -1] ^= 1
    other.tensors["lm_head.weight"] = tensor._replace(data=bytes(data))
    source = both(tmp_path, model(), other)
    message = "lm_head.weight differs between model.safetensors and model-0000[12]-of-00002"
    refused(source, tmp_path, CheckpointError, message)
    with pytest.raises(CheckpointError, match=message):
        nanotron_fast.verify(source, source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.norm.weight", "model.norm.weight is in model.safetensors alone"),
        ("more.weight", f"more.weight is in {INDEX} alone"),
    ],
)
def test_other_names_are_refused_from_headers(name: str, message: str, tmp_path: Path) -> None:
    other = model()
    if name in other.tensors:
        del other.tensors[name]
    else:
        other.tensors[name] = random_tensor(np.random.default_rng(0), "BF16", (2,))
    refused(both(tmp_path, model(), other), tmp_path, CheckpointError, message)


def test_other_dtypes_are_refused_from_headers(tmp_path: Path) -> None:
    source = both(tmp_path, model(), make("llama", num_hidden_layers=1, dtype="F32"))
    refused(source, tmp_path, CheckpointError, f"is BF16 in {SINGLE} and F32 in model-0000")


def test_a_stale_index_is_left_alone(tmp_path: Path) -> None:
    source = both(tmp_path, model(1), model(2))
    (source / SHARD).unlink()
    report = nanotron_fast.convert(source, tmp_path / "there")
    (warning,) = report.plan.warnings
    assert f"{INDEX} places tensors in {SHARD}, which is not there: it is left alone" in warning
    nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == model(1).tensors


def test_an_index_of_the_single_file_is_no_second_set(tmp_path: Path) -> None:
    source = model().save(tmp_path / "source")
    write_json(source / INDEX, {"weight_map": dict.fromkeys(model().tensors, SINGLE)})
    assert nanotron_fast.convert(source, tmp_path / "there").plan.warnings == ()


def test_the_file_that_the_config_names(tmp_path: Path) -> None:
    """transformers_weights of config.json goes before every other name."""
    source = model(1).save(tmp_path / "source")
    (source / SINGLE).rename(source / "mine.safetensors")
    model(2).save(source)
    changed = {**model().written_config("full"), "transformers_weights": "mine.safetensors"}
    write_json(source / "config.json", changed)
    checkpoint = read_hf(source)
    assert {tensor.path.name for tensor in checkpoint.tensors.values()} == {"mine.safetensors"}
    nanotron_fast.convert(source, tmp_path / "there")
    nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == model(1).tensors
    assert "transformers_weights" not in json.loads((tmp_path / "back/config.json").read_text())


@pytest.mark.parametrize("name", ["../out.safetensors", "weights.bin", 7, "gone.safetensors"])
def test_a_senseless_name_in_the_config(name: object, tmp_path: Path) -> None:
    source = model().save(tmp_path / "source")
    changed = {**model().written_config("full"), "transformers_weights": name}
    write_json(source / "config.json", changed)
    refused(source, tmp_path, CheckpointError, "transformers_weights of config.json is")


def test_a_pickle_beside_safetensors_is_left_behind(tmp_path: Path) -> None:
    source = model().save(tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    report = nanotron_fast.convert(source, tmp_path / "there")
    assert report.plan.left_behind == ("pytorch_model.bin",)


def test_a_variant_alone_is_named(tmp_path: Path) -> None:
    source = model().save(tmp_path / "source")
    (source / SINGLE).rename(source / "model.fp16.safetensors")
    refused(source, tmp_path, CheckpointError, "only model.fp16.safetensors.*variant 'fp16'")


def test_shards_without_their_index(tmp_path: Path) -> None:
    source = model().save(tmp_path / "source", shards=2)
    (source / INDEX).unlink()
    refused(source, tmp_path, CheckpointError, f"{SHARD} is there, and {INDEX}.* is missing")


def test_all_missing_shards_are_counted(tmp_path: Path) -> None:
    source = model().save(tmp_path / "source", shards=3)
    for number in (1, 2):
        (source / f"model-0000{number}-of-00003.safetensors").unlink()
    message = "0000[12]-of-00003.safetensors is missing .so are 1 more of 3."
    refused(source, tmp_path, CheckpointError, message)


def test_a_merged_model_beside_its_adapter(tmp_path: Path) -> None:
    source = model().save(tmp_path / "source")
    write_json(source / "adapter_config.json", {"base_model_name_or_path": "base"})
    report = nanotron_fast.convert(source, tmp_path / "there")
    (warning,) = report.plan.warnings
    assert "adapter_config.json lies beside the weights" in warning
    assert report.plan.left_behind == ("adapter_config.json",)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_the_index_places_and_no_shard_holds(tied: bool, tmp_path: Path) -> None:
    tensors = make("llama", num_hidden_layers=1, tie_word_embeddings=tied)
    tensors.tensors.pop("lm_head.weight", None)
    source = tensors.save(tmp_path / "source", shards=2)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = SHARD
    write_json(source / INDEX, index)
    if not tied:
        refused(source, tmp_path, CheckpointError, "lm_head.weight is missing")
        return
    (warning,) = nanotron_fast.convert(source, tmp_path / "there").plan.warnings
    assert "the index places lm_head.weight in a file that does not hold it" in warning
    assert read_file(source / SHARD)[0].keys() <= tensors.tensors.keys()
