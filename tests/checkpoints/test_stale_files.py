"""Files of another topology in a checkpoint, which Nanotron would merge in silence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast.checkpoints.reshard import reshard
from nanotron_fast.errors import CheckpointError
from nanotron_fast.train import TrainingConfig
from nanotron_fast.train.architecture import architecture
from nanotron_fast.train.optimizer_states import StoredStates
from tests.train.configs import document

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "training" / "llama_tied_tp2_zero0" / "2"
NORM = "model/model/final_layer_norm/pp_block"
WHAT_TO_DO = "Remove those of the topology that did not write this checkpoint"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "source"))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    reshard(GOLDEN, tmp_path / "other", tp=1, pp=2, dp=2, zero_stage=1)
    return tmp_path / "other"


def refused(source: Path, *said: str) -> None:
    """By all that reads weights."""
    for call in (
        lambda: nanotron_fast.inspect(source),
        lambda: nanotron_fast.verify(source, GOLDEN),
        lambda: nanotron_fast.convert(source, source.parent / "out"),
        lambda: reshard(source, source.parent / "out", tp=1),
    ):
        with pytest.raises(CheckpointError) as raised:
            call()
        for words in (*said, WHAT_TO_DO):
            assert words in str(raised.value)
    assert not (source.parent / "out").exists()


def warned(source: Path, *said: str) -> None:
    """Of states beside weights that are whole: who reads the states refuses them."""
    inspected = nanotron_fast.inspect(source).warnings
    compared = nanotron_fast.verify(source, GOLDEN).warnings
    planned = nanotron_fast.plan(source, source.parent / "out").warnings
    for warnings in (inspected, compared, planned):
        assert any(all(words in each for words in said) for each in warnings), warnings
    # Of a run that begins with the weights alone nothing is said; one that goes on ends with it.
    begun = document(model={"init_method": {"path": str(source)}})
    assert not architecture(TrainingConfig.from_dict(begun)).warnings
    for call in (
        lambda: reshard(source, source.parent / "out", tp=1),
        lambda: StoredStates(source),
    ):
        with pytest.raises(CheckpointError) as raised:
            call()
        for words in said:
            assert words in str(raised.value)
    assert not (source.parent / "out").exists()


def test_all_weights_of_another_topology(source: Path, other: Path) -> None:
    shutil.copytree(other / "model", source / "model", dirs_exist_ok=True)
    refused(source, "two topologies are mixed", "-of-1.safetensors", "-of-2.safetensors")


def test_one_shard_of_another_topology(source: Path, other: Path) -> None:
    path = next((other / "model").rglob("*_tp-rank-0-of-1.safetensors"))
    shutil.copy(path, source / path.relative_to(other))
    refused(source, "mixed")


def test_a_replicated_file_beside_shards(source: Path) -> None:
    path = next((source / "model").rglob("*_tp-rank-0-of-2.safetensors"))
    name = path.name.partition("_pp-rank")[0]
    shutil.copy(path, path.with_name(f"{name}.safetensors"))
    refused(source, "both whole and in shards", "mixed")


def test_shards_beside_a_replicated_file(source: Path) -> None:
    path = source / NORM / "model_weight.safetensors"
    for rank in (0, 1):
        name = f"model_weight_pp-rank-0-of-1_tp-rank-{rank}-of-2.safetensors"
        shutil.copy(path, path.with_name(name))
    refused(source, "both whole and in shards", "mixed")


def test_weights_that_the_metadata_does_not_speak_of(source: Path) -> None:
    path = source / "checkpoint_metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tp": 4}))
    refused(source, "checkpoint_metadata.json: it says tp=4", "TP=2")


def test_states_of_two_topologies(source: Path, other: Path) -> None:
    for path in (other / "optimizer").glob("*.pt"):
        shutil.copy(path, source / "optimizer")
    warned(source, "2 topologies are mixed", "tp=1 pp=2 dp=2", "tp=2 pp=1", WHAT_TO_DO)


def test_learning_rates_of_two_topologies(source: Path, other: Path) -> None:
    for path in (other / "lr_scheduler").glob("*.pt"):
        shutil.copy(path, source / "lr_scheduler")
    warned(source, "lr_scheduler: files of 2 topologies are mixed", WHAT_TO_DO)


def test_all_states_of_another_topology(source: Path, other: Path) -> None:
    shutil.rmtree(source / "optimizer")
    shutil.copytree(other / "optimizer", source / "optimizer")
    warned(source, "says tp=2", "tp=1 pp=2 dp=2 with zero_stage=1", WHAT_TO_DO)


def test_learning_rates_of_another_topology(source: Path, other: Path) -> None:
    shutil.rmtree(source / "lr_scheduler")
    shutil.copytree(other / "lr_scheduler", source / "lr_scheduler")
    warned(source, "its files are of tp=1 pp=2", "tp=2 pp=1", WHAT_TO_DO)


def test_a_configuration_of_another_topology(source: Path, other: Path) -> None:
    shutil.copy(other / "optimizer" / "optimizer_config.json", source / "optimizer")
    warned(source, "it speaks of tp=1 pp=2 dp=2", "are of tp=2 pp=1", WHAT_TO_DO)


def test_states_of_other_data_parallel_ranks_than_the_metadata(other: Path) -> None:
    path = other / "checkpoint_metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dp": 3}))
    warned(other, "it says dp=3", "dp=2 with zero_stage=1", WHAT_TO_DO)


def test_states_of_other_stages_than_the_weights(source: Path, tmp_path: Path) -> None:
    reshard(GOLDEN, tmp_path / "more", pp=2)
    for folder in ("optimizer", "lr_scheduler"):
        shutil.rmtree(source / folder)
        shutil.copytree(tmp_path / "more" / folder, source / folder)
    with pytest.raises(CheckpointError, match=r"pp=2 .*and the weights of tp=2 pp=1"):
        reshard(source, tmp_path / "out")
    assert any(
        "the weights of tp=2 pp=1" in each for each in nanotron_fast.inspect(source).warnings
    )


def test_a_file_of_the_states_is_missing(source: Path) -> None:
    next((source / "optimizer").glob("*.pt")).unlink()
    warned(source, "1 files of tp=2 pp=1, which has 2; some are missing")


def test_no_files_of_the_states(source: Path) -> None:
    for path in (source / "optimizer").glob("*.pt"):
        path.unlink()
    warned(source, "there are no states of an optimizer in it")


@pytest.mark.parametrize(
    ("parallelism", "shown"),
    [
        ([1], r"parallelism is \[1\]"),
        ({"tp_size": 2, "pp_size": None, "dp_size": 1}, "parallelism is {'tp_size': 2, 'pp_size'"),
        ({"tp_size": 2}, r"parallelism is {'tp_size': 2}"),
    ],
)
def test_a_configuration_without_the_ranks(parallelism: Any, shown: str, source: Path) -> None:
    path = source / "optimizer" / "optimizer_config.json"
    path.write_text(json.dumps({"type": "adam", "parallelism": parallelism}))
    with pytest.raises(CheckpointError, match=f"{path}: .* tp_size, pp_size and dp_size") as told:
        reshard(source, source.parent / "out", tp=1)
    assert re.search(f"type is 'adam', {shown}", str(told.value))
    assert "Error" not in str(told.value)
