"""Nanotron folders with files that are missing, stale, strange or of another model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast import Topology
from nanotron_fast.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.modelzoo import Model, Tensor, make, read_file, read_tensors, safetensors_bytes

MODEL: Model = make("qwen2_moe", num_hidden_layers=2)
QKV = "model/model/decoder/1/pp_block/attn/qkv_proj"
NORM = "model/model/decoder/0/pp_block/input_layernorm/model_weight.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    MODEL.save(tmp_path / "hf")
    nanotron_fast.convert(tmp_path / "hf", tmp_path / "source", topology=Topology(tp=2))
    shutil.rmtree(tmp_path / "hf")
    return tmp_path / "source"


def refused(source: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=message):
        nanotron_fast.convert(source, source.parent / "out")
    assert not (source.parent / "out").exists()
    assert not (source.parent / "out.partial").exists()


def shard(source: Path, rank: int, folder: str = QKV) -> Path:
    return source / folder / f"model_weight_pp-rank-0-of-1_tp-rank-{rank}-of-2.safetensors"


def rewrite(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    path.write_bytes(safetensors_bytes(tensors.items(), metadata))


def test_stale_shards_of_another_topology(source: Path) -> None:
    """Nanotron's own loader merges them in silence, and loads wrong weights."""
    twin = source.parent / "twin"
    MODEL.save(source.parent / "hf")
    nanotron_fast.convert(source.parent / "hf", twin, topology=Topology(tp=4))
    shutil.copytree(twin / "model", source / "model", dirs_exist_ok=True)
    refused(source, "two topologies are mixed")


def test_one_stale_shard(source: Path) -> None:
    path = shard(source, 0)
    shutil.copy(path, path.with_name("model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors"))
    refused(source, "two topologies are mixed")


def test_stale_pipeline(source: Path) -> None:
    path = shard(source, 0)
    path.rename(path.with_name("model_weight_pp-rank-1-of-2_tp-rank-0-of-2.safetensors"))
    refused(source, "two topologies are mixed: TP=2 PP=. .* and TP=2 PP=.")


def test_same_shard_of_two_stages(source: Path) -> None:
    """Where `of` is the same, too."""
    folder = source.parent / "pp"
    MODEL.save(source.parent / "hf")
    nanotron_fast.convert(source.parent / "hf", folder, topology=Topology(tp=2, pp=2))
    path = next((folder / QKV).glob("*tp-rank-0*"))
    stage = path.name.split("-rank-")[1][0]
    other = {"0": "1", "1": "0"}[stage]
    shutil.copy(path, path.with_name(path.name.replace(f"pp-rank-{stage}", f"pp-rank-{other}")))
    refused(folder, "holds the same shard of model.decoder.1.pp_block.attn.qkv_proj.weight")


def test_whole_and_in_shards(source: Path) -> None:
    path = shard(source, 0)
    shutil.copy(path, path.with_name("model_weight.safetensors"))
    refused(source, "qkv_proj.weight is there both whole and in shards")


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_rank(rank: int, source: Path) -> None:
    shard(source, rank).unlink()
    refused(source, rf"qkv_proj.weight has shards of TP ranks .* of 2; \[{rank}\] are missing")


def test_rank_out_of_range(source: Path) -> None:
    path = shard(source, 0)
    shutil.copy(path, path.with_name("model_weight_pp-rank-0-of-1_tp-rank-7-of-2.safetensors"))
    refused(source, r"qkv_proj.weight has shards of TP ranks \[0, 1, 7\] of 2")


def test_stage_out_of_range(source: Path) -> None:
    path = shard(source, 0)
    path.rename(path.with_name("model_weight_pp-rank-5-of-1_tp-rank-0-of-2.safetensors"))
    refused(source, "pp-rank-5-of-1")


@pytest.mark.parametrize("size", ["0", "00", "99999999999999999999"])
def test_sizes_in_names(size: str, source: Path) -> None:
    path = shard(source, 0)
    for rank in (0, 1):
        other = shard(source, rank)
        other.rename(
            path.with_name(f"model_weight_pp-rank-0-of-1_tp-rank-{rank}-of-{size}.safetensors")
        )
    refused(source, "two topologies are mixed")


def test_every_name_says_tp_0(source: Path) -> None:
    for path in list(source.rglob("*_tp-rank-*")):
        path.rename(path.with_name(path.name.replace("-of-2.", "-of-0.")))
    refused(source, "of 0|at least one rank")


def test_every_name_says_a_huge_tp(source: Path) -> None:
    """It must not loop over so many ranks."""
    for path in list(source.rglob("*_tp-rank-*")):
        path.rename(path.with_name(path.name.replace("-of-2.", "-of-9999999999.")))
    (source / "checkpoint_metadata.json").unlink()
    refused(source, "tp=0,1 of TP=9999999999 PP=1 are there alone")
    assert nanotron_fast.inspect(source).num_tensors == 25


def test_missing_parameter(source: Path) -> None:
    (source / NORM).unlink()
    refused(source, "model.decoder.0.pp_block.input_layernorm.weight is missing")


def test_missing_layer(source: Path) -> None:
    shutil.rmtree(source / "model/model/decoder/1")
    refused(source, "model.decoder.1.pp_block.* is missing")


@pytest.mark.parametrize("name", ["model/model/decoder/2/pp_block/x", "model/ghost"])
def test_unknown_parameter(name: str, source: Path) -> None:
    (source / name).mkdir(parents=True)
    shutil.copy(source / NORM, source / name / "model_weight.safetensors")
    refused(source, "1 parameters have no place in Hugging Face's qwen2_moe: ")


def test_expert_parallel_files(source: Path) -> None:
    path = next((source / "model").rglob("experts/*"))
    stem = path.name.removesuffix(".safetensors")
    split = f"{stem}_pp-rank-0-of-1_tp-rank-0-of-2_exp-rank-{{}}-of-2.safetensors"
    path.rename(path.with_name(split.format(2)))
    refused(source, "split over 2 ranks lie in files of .*, and this is none of those")
    path.with_name(split.format(2)).rename(path.with_name(split.format(0)))
    refused(source, r"has shards of EP ranks \[0\] of 2; \[1\] are missing")
    shutil.copy(path.with_name(split.format(0)), path)
    refused(source, "files of two topologies are mixed: EP=2 .* and EP=1 ")


@pytest.mark.parametrize(
    "name",
    [
        "weight.safetensors",
        "model_.safetensors",
        "model_weight_pp-rank-0-of-1.safetensors",
        "model_weight-2.safetensors",
        "model_weight (copy).safetensors",
        "model_weight_pp-rank-x-of-1_tp-rank-0-of-1.safetensors",
        ".safetensors",
    ],
)
def test_other_names(name: str, source: Path) -> None:
    shutil.copy(source / NORM, (source / NORM).with_name(name))
    refused(source, "not a name that Nanotron gives to a tensor's file")


def test_files_of_other_kinds_are_left_alone(source: Path) -> None:
    for name in (".DS_Store", "notes.txt", "model_weight.safetensors.bak"):
        (source / NORM).with_name(name).write_bytes(b"?")
    (source / "optimizer").mkdir()
    (source / "optimizer" / "optimizer.pt").write_bytes(b"?")
    nanotron_fast.convert(source, source.parent / "out")
    assert read_tensors(source.parent / "out") == MODEL.tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_global_slices_pairs": "nonsense"}, "its slices are nonsense, the model calls"),
        ({"local_global_slices_pairs": ""}, "its slices are "),
        ({"unsharded_shape": "(1, 2)"}, r"a shard of a tensor of shape \(1, 2\)"),
        ({"unsharded_shape": ""}, "a shard of a tensor of shape"),
    ],
)
def test_slices_that_are_wrong(change: dict[str, str], message: str, source: Path) -> None:
    path = shard(source, 1)
    tensors, metadata = read_file(path)
    rewrite(path, tensors, {**(metadata or {}), **change})
    refused(source, message)


@pytest.mark.parametrize("key", ["version", "unsharded_shape", "local_global_slices_pairs"])
def test_metadata_that_is_missing(key: str, source: Path) -> None:
    path = shard(source, 1)
    tensors, metadata = read_file(path)
    assert metadata is not None
    del metadata[key]
    rewrite(path, tensors, metadata)
    refused(source, f"{path.name}: __metadata__ of a sharded tensor lacks '{key}'")


def test_no_metadata_at_all(source: Path) -> None:
    rewrite(shard(source, 1), read_file(shard(source, 1))[0], None)
    refused(source, "__metadata__ of a sharded tensor lacks 'version'")


@pytest.mark.parametrize("version", ["1.6", "2.0", "9", "", "x", "1.5beta"])
def test_version_of_the_future(version: str, source: Path) -> None:
    path = shard(source, 1)
    tensors, metadata = read_file(path)
    rewrite(path, tensors, {**(metadata or {}), "version": version})
    refused(source, f"{path.name}: checkpoint version '{version}'; this release knows")


@pytest.mark.parametrize("version", ["1.2", "1.3", "1.4"])
def test_version_of_the_past(version: str, source: Path) -> None:
    for path in source.rglob("*_tp-rank-*"):
        tensors, metadata = read_file(path)
        rewrite(path, tensors, {**(metadata or {}), "version": version})
    nanotron_fast.convert(source, source.parent / "out")
    assert read_tensors(source.parent / "out") == MODEL.tensors


def test_swapped_ranks(source: Path) -> None:
    first, second, aside = shard(source, 0), shard(source, 1), source / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    refused(source, "its slices are .*, the model calls for")


def test_shapes_as_numpy_2_prints_them(source: Path) -> None:
    """Nanotron under numpy 2 writes "(np.int64(128), 64)" into files that it splits in chunks."""
    num_rewritten = 0
    for path in source.rglob("*_tp-rank-*"):
        tensors, metadata = read_file(path)
        assert metadata is not None
        first, rest = metadata["unsharded_shape"][1:].split(",", 1)
        metadata["unsharded_shape"] = f"(np.int64({first}),{rest}"
        rewrite(path, tensors, metadata)
        num_rewritten += 1
    assert num_rewritten > 8
    nanotron_fast.convert(source, source.parent / "out")
    assert read_tensors(source.parent / "out") == MODEL.tensors


def test_shape_of_another_model(source: Path) -> None:
    path = shard(source, 1)
    tensors, metadata = read_file(path)
    data = tensors["data"]
    rewrite(path, {"data": data._replace(shape=(data.shape[1], data.shape[0]))}, metadata)
    tensors = {"data": Tensor("BF16", (4, 2), bytes(16))}
    rewrite(source / NORM, tensors, {})
    refused(source, r"shape \[4, 2\], model_config.json at TP=2 calls for \[64\]")


def test_dtypes_of_shards_that_differ(source: Path) -> None:
    path = shard(source, 1)
    tensors, metadata = read_file(path)
    rewrite(path, {"data": tensors["data"]._replace(dtype="F16")}, metadata)
    refused(source, "shards of .*qkv_proj.weight have different dtypes: BF16, F16")


def test_quantised_shards(source: Path) -> None:
    rewrite(source / NORM, {"data": Tensor("I8", (64,), bytes(64))}, {})
    refused(source, "input_layernorm.weight is I8: quantised", UnsupportedModelError)


@pytest.mark.parametrize("name", ["weight", "", "Data"])
def test_tensor_of_another_name(name: str, source: Path) -> None:
    tensors, metadata = read_file(source / NORM)
    rewrite(source / NORM, {name: tensors["data"]}, metadata)
    refused(source, "a Nanotron file holds one 'data'")


def test_two_tensors_in_a_file(source: Path) -> None:
    tensors, metadata = read_file(source / NORM)
    rewrite(source / NORM, {**tensors, "more": tensors["data"]}, metadata)
    refused(source, "it holds data, more; a Nanotron file holds one 'data'")


def test_no_weights(source: Path) -> None:
    shutil.rmtree(source / "model" / "model")
    refused(source, "there are no tensors in it")
    shutil.rmtree(source / "model")
    refused(source, "no folder model/")


@pytest.mark.parametrize("step", ["", "7", "../source", "/", "2\0", "-1", "2/../2"])
def test_latest_that_points_nowhere(step: str, tmp_path: Path) -> None:
    (tmp_path / "latest.txt").write_text(step)
    with pytest.raises(CheckpointError, match=r"latest\.txt: it points to"):
        nanotron_fast.plan(tmp_path, tmp_path.parent / "out")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "model.decoder.2.* is missing"),
        ({"num_hidden_layers": 1}, r"layers is \[0, 1\], and should be a list of layers"),
        ({"vocab_size": 320}, r"token_embedding.*shape \[80, 64\].*calls for \[160, 64\]"),
        ({"tie_word_embeddings": True}, "1 parameters have no place .*model.lm_head"),
        ({"attention_bias": False}, "2 parameters have no place .*qkv_proj.bias"),
        ({"hidden_size": 128}, r"token_embedding.*shape \[80, 64\].*calls for \[80, 128\]"),
        ({"num_attention_heads": 4}, "calls for|head_dim"),
        (
            {"moe_config": None},
            "--family qwen2_moe|qwen2_moe: the checkpoint has no experts|missing",
        ),
    ],
)
def test_model_config_of_another_model(changes: dict[str, Any], message: str, source: Path) -> None:
    (source / "nanotron_fast.json").unlink()
    edit(source / "model_config.json", **changes)
    refused(source, message, ValueError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"dtypes": {"model.layers.0.mlp.gate.weight": ["BF16"]}}, "dtypes are no names"),
    ],
)
def test_side_file_that_makes_no_sense(changes: dict[str, Any], message: str, source: Path) -> None:
    path = source / "nanotron_fast.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(source, message)


def test_rope_interleaved_that_is_no_flag(source: Path) -> None:
    path = source / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_interleaved": "no"}))
    refused(source, "rope_interleaved is 'no'", ConfigError)


def test_positions_that_nanotron_divides(source: Path) -> None:
    path = source / "model_config.json"
    config = {**json.loads(path.read_text()), "rope_seq_len_interpolation_factor": 4.0}
    path.write_text(json.dumps(config))
    refused(source, "rope_seq_len_interpolation_factor is 4.0", UnsupportedModelError)
