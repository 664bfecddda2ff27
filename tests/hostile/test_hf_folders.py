"""Hugging Face folders that are not what their index says."""

import json
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast.errors import CheckpointError
from tests.modelzoo import Tensor, make, safetensors_bytes, write_json

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make("llama", num_hidden_layers=1).save(tmp_path / "source", shards=2)


def refused(source: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=message):
        nanotron_fast.convert(source, source.parent / "out")
    assert sorted(path.name for path in source.parent.iterdir() if path != source) == []


def place(source: Path, tensor: str, name: Any) -> None:
    """Changes where the index places a tensor."""
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][tensor] = name
    write_json(source / INDEX, index)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "../../outside.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "./model-00001-of-00002.safetensors",
        "..",
        ".",
        "",
        "a\0b.safetensors",
        None,
        7,
        ["model-00001-of-00002.safetensors"],
        {},
    ],
)
def test_index_that_leads_elsewhere(name: Any, source: Path) -> None:
    place(source, "model.norm.weight", name)
    refused(source, "model.norm.weight is placed in .*, which is not a file name")


def test_name_of_a_folder(source: Path) -> None:
    (source / "folder.safetensors").mkdir()
    place(source, "model.norm.weight", "folder.safetensors")
    refused(source, "folder.safetensors is missing")


@pytest.mark.parametrize("weight_map", [None, {}, [], "a", 1])
def test_index_without_a_map(weight_map: Any, source: Path) -> None:
    write_json(source / INDEX, {"weight_map": weight_map})
    refused(source, f"{INDEX}: no weight_map")


def test_missing_shard(source: Path) -> None:
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(source, "model-00002-of-00002.safetensors is missing; .* places tensors in it")


def test_tensor_placed_in_the_wrong_shard(source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    wrong = {"1": "2", "2": "1"}[index["weight_map"]["lm_head.weight"][10]]
    place(source, "lm_head.weight", f"model-0000{wrong}-of-00002.safetensors")
    refused(source, "lm_head.weight")


def test_tensor_that_the_index_leaves_out(source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    write_json(source / INDEX, index)
    refused(source, f"it holds lm_head.weight, which {INDEX} does not place there")


def test_tensor_that_no_shard_has(source: Path) -> None:
    place(source, "ghost", "model-00001-of-00002.safetensors")
    refused(source, f"00001-of-00002.safetensors: {INDEX} places ghost there; it is not")


def test_shard_that_is_truncated(source: Path) -> None:
    path = source / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(source, f"{path.name}: the tensors end at byte .*: truncated")


def test_symlinks_that_go_in_circles(source: Path) -> None:
    for name, other in (("1", "2"), ("2", "1")):
        path = source / f"model-0000{name}-of-00002.safetensors"
        path.unlink()
        path.symlink_to(f"model-0000{other}-of-00002.safetensors")
    refused(source, "model-0000[12]-of-00002.safetensors is missing")


def test_config_that_is_a_circle(source: Path) -> None:
    (source / "config.json").unlink()
    (source / "config.json").symlink_to("config.json")
    refused(source, "neither a Hugging Face checkpoint")


def test_source_that_is_a_circle(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((CheckpointError, OSError), match="loop"):
        nanotron_fast.convert(tmp_path / "loop", tmp_path / "out")


def test_symlinked_shards_are_fine(source: Path, tmp_path: Path) -> None:
    """As in the Hub's cache, where every file is a link to a blob."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(source.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    nanotron_fast.convert(source, tmp_path / "out")


def test_config_that_is_a_folder(source: Path) -> None:
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    refused(source, "neither a Hugging Face checkpoint")


def test_unreadable_names(source: Path) -> None:
    path = source / "model-00001-of-00002.safetensors"
    path.write_bytes(safetensors_bytes([("a\nb", Tensor("BF16", (1,), b"ab"))]))
    refused(source, r"'a\\nb' is not a tensor's name")


@pytest.mark.parametrize("src", ["a/b/c", "../x", "https://example.com/a", "a b", "é"])
def test_no_directory_and_no_hub_id(src: str, tmp_path: Path) -> None:
    message = "there is nothing" if "://" in src else "no such directory"
    with pytest.raises(CheckpointError, match=message):
        nanotron_fast.convert(src, tmp_path / "out")
