"""What real Nanotron wrote, reproduced: tests/golden, made with nanotron at 2411b022."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast import Topology
from nanotron_fast.formats.nanotron.classes import classes
from nanotron_fast.formats.nanotron.stages import block_costs
from nanotron_fast.model.spec import Attention, Dense, Layer, ModelSpec
from nanotron_fast.model.topology import assign_stages
from tests.modelzoo import read_file, read_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/hf"))
TOPOLOGIES = [
    pytest.param(path.parent.name, path.stem, id=f"{path.parent.name}-{path.stem}")
    for path in sorted(GOLDEN.glob("*/tp*_pp*.json"))
]
STAGES: list[dict[str, Any]] = json.loads((GOLDEN / "pp_assignment_cases.json").read_text())
TRAINING = GOLDEN / "training" / "llama_tied_tp2_zero0"


def topology_of(stem: str) -> Topology:
    tp, pp = stem.removeprefix("tp").split("_pp")
    return Topology(tp=int(tp), pp=int(pp))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def describe(root: Path) -> dict[str, Any]:
    """Every weight file under a root, in the form of the golden lists."""
    found = {}
    for path in sorted((root / "model").rglob("*")):
        if path.is_dir():
            continue
        tensors, metadata = read_file(path)
        ((name, tensor),) = tensors.items()
        assert name == "data"
        found[str(path.relative_to(root))] = {
            "dtype": tensor.dtype,
            "metadata": metadata,
            "sha256": hashlib.sha256(tensor.data).hexdigest(),
            "shape": list(tensor.shape),
        }
    return found


def test_nothing_golden_is_missing() -> None:
    assert CASES == ["llama_tied", "llama_untied", "qwen2", "qwen2_moe", "starcoder2"]
    assert len(TOPOLOGIES) == 13
    assert len(STAGES) == 105


@pytest.mark.parametrize(("case", "stem"), TOPOLOGIES)
def test_same_files_as_nanotron(case: str, stem: str, tmp_path: Path) -> None:
    golden = read_json(GOLDEN / case / f"{stem}.json")
    nanotron_fast.convert(GOLDEN / case / "hf", tmp_path / "out", topology=topology_of(stem))
    assert describe(tmp_path / "out") == golden["files"]
    metadata = read_json(tmp_path / "out" / "checkpoint_metadata.json")
    assert metadata == golden["side"]["checkpoint_metadata.json"]


@pytest.mark.parametrize("case", CASES)
def test_model_config(case: str, tmp_path: Path) -> None:
    golden = read_json(GOLDEN / case / "tp1_pp1.json")["side"]["model_config.json"]
    nanotron_fast.convert(GOLDEN / case / "hf", tmp_path / "out")
    written = read_json(tmp_path / "out" / "model_config.json")
    if not case.startswith("llama"):
        assert written == golden
        return
    # The script that made the golden files wrote a Qwen2Config even for Llama.
    assert written.pop("is_llama_config") is True
    assert set(written) < set(golden)
    assert written == {key: golden[key] for key in written}


@pytest.mark.parametrize("case", ["llama_tied", "llama_untied"])
def test_model_config_of_a_llama_as_qwen2(case: str, tmp_path: Path) -> None:
    golden = read_json(GOLDEN / case / "tp1_pp1.json")
    nanotron_fast.convert(GOLDEN / case / "hf", tmp_path / "out", model_class="qwen2")
    assert read_json(tmp_path / "out" / "model_config.json") == golden["side"]["model_config.json"]
    assert describe(tmp_path / "out") == golden["files"]


@pytest.mark.parametrize(("case", "stem"), TOPOLOGIES)
def test_way_back_is_bit_identical(case: str, stem: str, tmp_path: Path) -> None:
    source = GOLDEN / case / "hf"
    nanotron_fast.convert(source, tmp_path / "there", topology=topology_of(stem))
    nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    generation = "generation_config.json"
    assert read_json(tmp_path / "back" / generation) == read_json(source / generation)


@pytest.mark.parametrize("number", range(len(STAGES)))
def test_stage_assignment(number: int) -> None:
    case = STAGES[number]
    heads = case["num_attention_heads"]
    head_dim = case["hidden_size"] // heads
    layer = Layer(
        Attention(heads, heads, head_dim, rotary=(0, head_dim)), Dense(case["intermediate_size"])
    )
    spec = ModelSpec(
        hidden_size=case["hidden_size"],
        layers=(layer,) * case["num_hidden_layers"],
        intermediate_size=case["intermediate_size"],
        vocab_size=case["vocab_size"],
        max_position_embeddings=128,
        hidden_act="silu",
        norm_eps=1e-6,
        initializer_range=0.02,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    by_name = {each.name: each for each in classes()}
    stages = assign_stages(block_costs(spec, by_name[case["cls"]]), case["pp"])
    assert stages == list(case["ranks"].values())


def test_training_checkpoint_becomes_a_hugging_face_one(tmp_path: Path) -> None:
    """The folder of steps is given; `latest.txt` says which. Optimizer files are not opened."""
    nanotron_fast.convert(TRAINING, tmp_path / "hf")
    tensors = read_tensors(tmp_path / "hf")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        name: (tensor.dtype, tensor.shape)
        for name, tensor in read_tensors(GOLDEN / "llama_tied" / "hf").items()
    }
    for layer in range(4):
        check_qkv(tensors, layer)
    config = read_json(tmp_path / "hf" / "config.json")
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True


def check_qkv(tensors: dict[str, Any], layer: int) -> None:
    """q, k and v lie one after another in each rank's shard."""
    folder = TRAINING / f"2/model/model/decoder/{layer}/pp_block/attn/qkv_proj"
    shards = []
    for rank in (0, 1):
        path = folder / f"model_weight_pp-rank-0-of-1_tp-rank-{rank}-of-2.safetensors"
        shards.append(read_file(path)[0]["data"].data)
    row_bytes = 64 * 2
    prefix = f"model.layers.{layer}.self_attn."
    for name, first, last in (("q_proj", 0, 32), ("k_proj", 32, 48), ("v_proj", 48, 64)):
        expected = b"".join(shard[first * row_bytes : last * row_bytes] for shard in shards)
        assert tensors[f"{prefix}{name}.weight"].data == expected


def test_training_checkpoint_by_its_step(tmp_path: Path) -> None:
    nanotron_fast.convert(TRAINING, tmp_path / "latest")
    nanotron_fast.convert(TRAINING / "2", tmp_path / "step")
    assert read_tensors(tmp_path / "latest") == read_tensors(tmp_path / "step")


def test_training_checkpoint_goes_back_as_it_was(tmp_path: Path) -> None:
    nanotron_fast.convert(TRAINING, tmp_path / "hf")
    nanotron_fast.convert(tmp_path / "hf", tmp_path / "again", topology=Topology(tp=2))
    assert describe(tmp_path / "again") == describe(TRAINING / "2")
    written = read_json(tmp_path / "again" / "model_config.json")
    assert written == read_json(TRAINING / "2" / "model_config.json")
