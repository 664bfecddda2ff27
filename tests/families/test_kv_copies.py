"""Fewer key-value heads than tensor-parallel ranks: several ranks have a copy of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.errors import CheckpointError, ConfigError, TopologyError
from nanotron_fast.formats.safetensors import read_header
from tests.families import zoo
from tests.modelzoo import make, read_tensors

TP = 4
# Each head has a norm of its own: one tensor for all of them, or one for each.
COHERE = "cohere, norms of queries and keys"
STABLELM = "stablelm, one norm a layer, norms of queries and keys, biases, tied"
LAYER = "model/model/decoder/0/pp_block/attn"


def saved(name: str, root: Path, **changes: Any) -> Path:
    """A model of either zoo, in bf16."""
    if name in zoo.ZOO:
        return zoo.save(name, root, torch.bfloat16, **changes)
    return make(name, num_hidden_layers=2, **changes).save(root)


def file_of(root: Path, param: str, rank: int, tp: int = TP) -> Path:
    return root / LAYER / f"{param}_pp-rank-0-of-1_tp-rank-{rank}-of-{tp}.safetensors"


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted((root / "model").rglob("*.safetensors"))
    }


@pytest.mark.parametrize(
    ("name", "kv_heads"),
    [
        ("llama", 2),
        ("llama", 1),
        ("qwen2", 1),
        ("starcoder2", 2),
        ("starcoder2", 1),
        ("qwen3", 2),
        ("olmo2, tied, biases", 2),
        ("olmo2, tied, biases", 1),
        ("phi3", 1),
        ("gpt_oss", 2),
        (COHERE, 2),
        (STABLELM, 1),
    ],
)
def test_there_and_back(name: str, kv_heads: int, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "hf", num_key_value_heads=kv_heads)
    choices: dict[str, Any] = {"target": "nanotron-fast"}
    report = nf.convert(source, tmp_path / "four", topology=Topology(tp=TP, pp=2), **choices)
    assert report.plan.model_class == "NanotronFastConfig"
    assert nf.verify(source, tmp_path / "four", logits=name == "qwen3").equal
    nf.convert(tmp_path / "four", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)
    # From one side of the line to the other and back: the files that a conversion writes.
    nf.reshard(tmp_path / "four", tmp_path / "one", tp=1, pp=1)
    assert nf.verify(tmp_path / "four", tmp_path / "one").equal
    nf.reshard(tmp_path / "one", tmp_path / "again", tp=TP, pp=2)
    assert contents(tmp_path / "again") == contents(tmp_path / "four")
    nf.convert(source, tmp_path / "directly", model_class="nanotron-fast", **choices)
    assert contents(tmp_path / "directly") == contents(tmp_path / "one")


def test_what_ranks_have_and_say(tmp_path: Path) -> None:
    """Rank r has query heads 2r and 2r + 1 of 8, and a copy of key-value head r // 2 of 2."""
    source = saved("llama", tmp_path / "hf", num_key_value_heads=2)
    nf.convert(source, tmp_path / "there", topology=Topology(tp=TP), target="nanotron-fast")
    tensors = load_file(source / "model.safetensors")
    q, k, v = (tensors[f"model.layers.0.self_attn.{each}_proj.weight"] for each in "qkv")
    for rank in range(TP):
        path = file_of(tmp_path / "there", "qkv_proj/model_weight", rank)
        head = slice(rank // 2 * 8, rank // 2 * 8 + 8)
        expected = torch.cat((q[16 * rank : 16 * rank + 16], k[head], v[head]))
        assert torch.equal(load_file(path)["data"], expected)
        metadata = read_header(path).metadata
        assert metadata["unsharded_shape"] == "(96, 64)"
        everything = "None,None,None"
        pairs = (
            (0, 16, 16 * rank),
            (16, 24, 64 + head.start),
            (24, 32, 80 + head.start),
        )
        assert metadata["local_global_slices_pairs"] == ";".join(
            f"{low},{high},None|{everything}#{at},{at + high - low},None|{everything}"
            for low, high, at in pairs
        )


def test_rows_by_key_value_head(tmp_path: Path) -> None:
    """A starcoder2's rank has its queries of a head, and a copy of the head's key and value."""
    source = saved("starcoder2", tmp_path / "hf", num_key_value_heads=2)
    nf.convert(source, tmp_path / "there", topology=Topology(tp=TP), target="nanotron-fast")
    tensors = load_file(source / "model.safetensors")
    for kind in ("weight", "bias"):
        q, k, v = (tensors[f"model.layers.0.self_attn.{each}_proj.{kind}"] for each in "qkv")
        for rank in range(TP):
            path = file_of(tmp_path / "there", f"query_key_value/model_{kind}", rank)
            head = slice(rank // 2 * 8, rank // 2 * 8 + 8)
            expected = torch.cat((q[16 * rank : 16 * rank + 16], k[head], v[head]))
            assert torch.equal(load_file(path)["data"], expected)
            first, copy = 48 * (rank // 2), rank % 2
            said = read_header(path).metadata["local_global_slices_pairs"]
            pairs = [pair.replace("|None,None,None", "") for pair in said.split(";")]
            assert pairs == [
                f"0,16,None#{first + 16 * copy},{first + 16 * copy + 16},None",
                f"16,32,None#{first + 32},{first + 48},None",
            ]


@pytest.mark.parametrize(
    ("name", "changes", "tp", "choices", "message"),
    [
        (
            "llama",
            {"num_key_value_heads": 2},
            4,
            {},
            r"qkv_proj.weight: 2 kv heads do not split over tp=4, and Nanotron's LlamaConfig has "
            r"no copies of them; --target nanotron-fast gives each of them to 2 ranks",
        ),
        (
            "qwen2",
            {"num_key_value_heads": 1},
            2,
            {"target": "nanotron-fast", "model_class": "qwen2"},
            r"1 kv heads .* Qwen2Config .*; --model-class auto gives each of them to 2 ranks",
        ),
        (
            "llama",
            {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8},
            4,
            {"target": "nanotron-fast"},
            r"qkv_proj.weight: 3 kv heads do not split over tp=4$",
        ),
        (
            "starcoder2",
            {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
            4,
            {"target": "nanotron-fast", "model_class": "nanotron-fast"},
            r"dense.weight: 6 heads do not split over tp=4$",
        ),
    ],
)
def test_what_is_refused(
    name: str, changes: Any, tp: int, choices: Any, message: str, tmp_path: Path
) -> None:
    source = saved(name, tmp_path / "hf", **changes)
    with pytest.raises(TopologyError, match=message):
        nf.convert(source, tmp_path / "there", topology=Topology(tp=tp), **choices)
    assert not (tmp_path / "there").exists()


def test_a_stock_checkpoint_is_not_resharded_to_copies(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "hf", num_key_value_heads=2)
    nf.convert(source, tmp_path / "two", topology=Topology(tp=2))
    with pytest.raises(TopologyError, match=r"2 kv heads .*convert --target nanotron-fast"):
        nf.reshard(tmp_path / "two", tmp_path / "four", tp=4)


def spoil(path: Path, row: int) -> None:
    """Changes one value of a shard, and nothing of its header."""
    data = bytearray(path.read_bytes())
    values = load_file(path)["data"]
    width = values[0].numel() * values.element_size()
    data[len(data) - (len(values) - row) * width] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "use",
    [
        lambda there, out: nf.convert(there, out),
        lambda there, out: nf.reshard(there, out, tp=1),
        lambda there, out: nf.reshard(there, out, tp=8),
    ],
    ids=["to Hugging Face", "to one rank", "to more copies"],
)
def test_copies_that_differ_are_refused(use: Callable[[Path, Path], Any], tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "hf", num_key_value_heads=2)
    there = tmp_path / "there"
    nf.convert(source, there, topology=Topology(tp=TP), target="nanotron-fast")
    path = file_of(there, "qkv_proj/model_weight", 3)
    spoil(path, 25)
    message = (
        r"tp-rank-3-of-4.safetensors: ranks 2 and 3 of TP=4 have copies of one key-value head of "
        r"model.decoder.0.pp_block.attn.qkv_proj.weight, which differ in 1 of 512 elements"
    )
    with pytest.raises(CheckpointError, match=message):
        use(there, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_names_copies_that_differ(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "hf", num_key_value_heads=2)
    there = tmp_path / "there"
    nf.convert(source, there, topology=Topology(tp=TP), target="nanotron-fast")
    spoil(file_of(there, "qkv_proj/model_weight", 1), 17)
    name = "model.layers.0.self_attn.k_proj.weight"
    for sides, label in (((source, there), "B"), ((there, source), "A")):
        [found] = nf.verify(*sides).differing
        assert found.name == f"{name} (ranks 0 and 1 of TP=4 in {label})"
        assert found.reason.startswith("1 of 512 elements differ")
    # The first is what both sides are compared by.
    spoil(file_of(there, "qkv_proj/model_weight", 0), 17)
    [found] = nf.verify(source, there).differing
    assert found.name == name


def test_a_rank_loads_its_copy(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "hf", num_key_value_heads=2)
    four, one = tmp_path / "four", tmp_path / "one"
    nf.convert(source, four, topology=Topology(tp=TP), target="nanotron-fast")
    nf.convert(source, one)
    files = [read_files(four, rank) for rank in range(TP)]
    for root in (source, four, one):
        for rank in range(TP):
            tensors = {name: torch.zeros_like(values) for name, values in files[rank].items()}
            nf.load_into(tensors, root, topology=Topology(tp=TP), rank=rank, target="nanotron-fast")
            for name, values in tensors.items():
                assert torch.equal(values, files[rank][name]), name
    with pytest.raises(TopologyError, match=r'2 kv heads .*target="nanotron-fast"'):
        nf.load_into(tensors, source, topology=Topology(tp=TP), rank=0)


def read_files(root: Path, rank: int) -> dict[str, torch.Tensor]:
    """A rank's parameters from its files."""
    found = {}
    for path in (root / "model").rglob("*.safetensors"):
        leaf = path.name.removeprefix("model_").removesuffix(".safetensors")
        leaf, _, ranks = leaf.partition("_pp-rank-")
        if not ranks or f"_tp-rank-{rank}-" in ranks:
            folders = path.parent.relative_to(root / "model").parts
            found[".".join((*folders, leaf))] = load_file(path)["data"]
    return found


def test_inspect_tells_of_copies(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "hf", num_key_value_heads=2)
    nf.convert(source, tmp_path / "there", topology=Topology(tp=TP), target="nanotron-fast")
    found = nf.inspect(tmp_path / "there")
    assert found.kv_head_copies == 2
    assert found.to_json()["kv_head_copies"] == 2
    assert nf.inspect(source).kv_head_copies is None


def test_slices_that_say_otherwise_are_refused(tmp_path: Path) -> None:
    """A shard whose header places it as if ranks had no copies."""
    source = saved("llama", tmp_path / "hf", num_key_value_heads=2)
    there = tmp_path / "there"
    nf.convert(source, there, topology=Topology(tp=TP), target="nanotron-fast")
    path = file_of(there, "qkv_proj/model_weight", 1)
    tensors, metadata = load_file(path), dict(read_header(path).metadata)
    pairs = metadata["local_global_slices_pairs"]
    metadata["local_global_slices_pairs"] = pairs.replace("#64,72", "#72,80")
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="its slices are"):
        nf.convert(there, tmp_path / "back")


def test_model_config_must_agree_with_the_files(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "hf", num_key_value_heads=2)
    there = tmp_path / "there"
    nf.convert(source, there, topology=Topology(tp=TP), target="nanotron-fast")
    config = json.loads((there / "model_config.json").read_text())
    config["layers"][0]["attention"]["num_kv_heads"] = 8
    (there / "model_config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, ConfigError), match=r"shape \[32, 64\]"):
        nf.convert(there, tmp_path / "back")
