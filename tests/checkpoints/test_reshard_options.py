"""What `reshard` is given and writes beside the tensors, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import nanotron_fast
from nanotron_fast.checkpoints.reshard import plan, reshard
from nanotron_fast.cli.commands import app
from nanotron_fast.errors import CheckpointError, ConfigError, DestinationError, TopologyError
from tests.modelzoo import make

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "training" / "llama_tied_tp2_zero0"
FIRST = "optimizer/optimizer_pp-0-of-1_tp-0-of-2_exp-0-of-1.pt"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "2", tmp_path / "source"))


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_sizes_of_the_source_are_the_default(tmp_path: Path) -> None:
    planned = plan(GOLDEN, tmp_path / "out")
    assert str(planned.topology) == "TP=2 PP=1"
    assert planned.states == planned.source_states
    assert str(planned.states) == "tp=2 pp=1 dp=1 with zero_stage=0"
    sizes = {"tp": 2, "pp": 1, "dp": 1, "zero_stage": 0, "ep": 1}
    assert planned.to_json(1)["states"] == sizes
    again = tmp_path / "shared"
    reshard(GOLDEN, again, dp=2, zero_stage=1)
    assert str(plan(again, tmp_path / "out").states) == "tp=2 pp=1 dp=2 with zero_stage=1"
    assert str(plan(again, tmp_path / "out", zero_stage=0).states) == (
        "tp=2 pp=1 dp=2 with zero_stage=0"
    )


@pytest.mark.parametrize(
    ("choices", "error", "said"),
    [
        ({"tp": 3}, TopologyError, "do not split over tp=3"),
        ({"pp": 9}, TopologyError, "pp=9"),
        ({"tp": 0}, TopologyError, "tp=0"),
        ({"ep": 2}, TopologyError, "ep=2: the model has no experts"),
        ({"dp": 0}, ConfigError, "--dp 0"),
        ({"dp": 1 << 40}, ConfigError, "--dp 1099511627776"),
        ({"zero_stage": 2}, ConfigError, "--zero-stage 2: choose 0 or 1"),
    ],
    ids=str,
)
def test_choices_that_are_refused(
    tmp_path: Path, choices: dict[str, int], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        reshard(GOLDEN, tmp_path / "out", **choices)
    assert not list(tmp_path.iterdir())


def test_a_hugging_face_folder_is_refused(tmp_path: Path) -> None:
    hf = make("llama", num_hidden_layers=1).save(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"not a Nanotron checkpoint.*use convert"):
        reshard(hf, tmp_path / "out")


def test_weights_alone(tmp_path: Path) -> None:
    hf = make("llama", num_hidden_layers=2).save(tmp_path / "hf")
    nanotron_fast.convert(hf, tmp_path / "one")
    reshard(tmp_path / "one", tmp_path / "two", tp=2, pp=2, dp=4)
    assert nanotron_fast.verify(hf, tmp_path / "two").equal
    assert json.loads((tmp_path / "two" / "checkpoint_metadata.json").read_text())["dp"] == 4
    with pytest.raises(ConfigError, match="--zero-stage 1: the checkpoint has no states"):
        reshard(tmp_path / "one", tmp_path / "three", zero_stage=1)


def test_a_vocabulary_gets_the_rows_that_the_trainer_would_add(tmp_path: Path) -> None:
    hf = make("llama", num_hidden_layers=1, vocab_size=66).save(tmp_path / "hf")
    nanotron_fast.convert(hf, tmp_path / "one")
    planned = plan(tmp_path / "one", tmp_path / "four", tp=4)
    assert any("gets 2 rows of zeros, to 68" in each for each in planned.warnings)
    reshard(tmp_path / "one", tmp_path / "four", tp=4)
    config = json.loads((tmp_path / "four" / "model_config.json").read_text())
    assert config["vocab_size"] == 68
    assert nanotron_fast.verify(hf, tmp_path / "four").equal
    # Rows that are there stay.
    reshard(tmp_path / "four", tmp_path / "back", tp=1)
    assert json.loads((tmp_path / "back" / "model_config.json").read_text())["vocab_size"] == 68
    document = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    document["model"]["make_vocab_size_divisible_by"] = 50
    (tmp_path / "one" / "config.yaml").write_text(yaml.safe_dump(document))
    reshard(tmp_path / "one", tmp_path / "two", tp=2)
    assert json.loads((tmp_path / "two" / "model_config.json").read_text())["vocab_size"] == 100


@pytest.mark.parametrize(
    ("name", "there", "latest"),
    [
        ("2", None, "2"),
        ("2", "1", "2"),
        ("2", "junk", "2"),
        ("2", "7", "7"),
        ("3", None, None),
        ("new", None, None),
    ],
)
def test_which_step_is_the_latest(
    tmp_path: Path, name: str, there: str | None, latest: str | None
) -> None:
    if there is not None:
        (tmp_path / "latest.txt").write_text(there)
        (tmp_path / there).mkdir()
    reshard(GOLDEN, tmp_path / name, tp=1)
    path = tmp_path / "latest.txt"
    assert (path.read_text() if path.exists() else None) == latest
    assert not list(tmp_path.glob(".*"))


def test_the_batch_is_the_users(tmp_path: Path) -> None:
    warnings = plan(GOLDEN, tmp_path / "out", dp=2).warnings
    assert any(
        "batch_accumulation_per_replica stays 1, so that a step takes 2/1" in w for w in warnings
    )
    assert not plan(GOLDEN, tmp_path / "out", tp=1).warnings


def test_a_destination_in_the_way(tmp_path: Path) -> None:
    reshard(GOLDEN, tmp_path / "2")
    before = files_in(tmp_path)
    with pytest.raises(DestinationError, match="--overwrite"):
        reshard(GOLDEN, tmp_path / "2", tp=1)
    assert files_in(tmp_path) == before
    reshard(GOLDEN, tmp_path / "2", tp=1, overwrite=True)
    assert json.loads((tmp_path / "2" / "checkpoint_metadata.json").read_text())["tp"] == 1


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    document = torch.load(path, weights_only=True)
    changed = change(document)
    torch.save(document if changed is None else changed, path)


def drop_name(document: Any) -> None:
    document["names"].pop(3)


def drop_parameter(document: Any) -> None:
    index = max(document["names"])
    document["names"].pop(index)
    document["state"].pop(index)


def rename(document: Any) -> None:
    document["names"][0] = "model.nobody.weight"


def name_twice(document: Any) -> None:
    document["names"][1] = document["names"][0]


def other_shape(document: Any) -> None:
    document["state"][0]["exp_avg"] = torch.zeros(3, 3)


def turned(document: Any) -> None:
    state = document["state"][2]
    state["exp_avg"] = torch.zeros(state["exp_avg"].shape[::-1]).t()


def integers(document: Any) -> None:
    state = document["state"][0]
    state["exp_avg"] = state["exp_avg"].to(torch.int32)


def other_dtype(document: Any) -> None:
    state = document["state"][0]
    state["exp_avg"] = state["exp_avg"].to(torch.bfloat16)


def one_group(document: Any) -> None:
    document["param_groups"] = [{"lr": 1.0, "params": list(document["names"])}]


def no_groups(document: Any) -> None:
    document["param_groups"] = []


def no_master(document: Any) -> None:
    document["gradient_accumulator"].popitem()


def more(document: Any) -> None:
    document["base_optimizer"] = {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_name, "names are not those of the states"),
        (drop_parameter, "there are no states of 1 parameters"),
        (rename, "that the model has not: model.nobody.weight"),
        (name_twice, "names a parameter twice"),
        (other_shape, r"exp_avg of .*token_embedding.weight has shape \[3, 3\]"),
        (turned, "not stored in one piece"),
        (integers, "exp_avg of .* is I32"),
        (other_dtype, "is BF16, F32"),
        (one_group, "a group of constants is of 26 parameters"),
        (no_groups, "there are no constants of"),
        (no_master, "there is no master of"),
        (more, "it holds base_optimizer"),
        (lambda _: [1], "holds a list"),
        (lambda _: {"state": 1, "names": {}}, "not laid out"),
        (lambda _: {"state": {}}, "it lacks names"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_states_that_make_no_sense(
    source: Path, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    rewrite(source / FIRST, change)
    with pytest.raises(CheckpointError, match=said) as raised:
        reshard(source, tmp_path / "out", tp=1)
    assert "optimizer" in str(raised.value)
    assert files_in(tmp_path) == ["source", *(f"source/{name}" for name in files_in(source))]


def test_learning_rates_that_make_no_sense(source: Path, tmp_path: Path) -> None:
    path = source / "lr_scheduler" / "lr_scheduler_pp-0-of-1_tp-0-of-2_exp-0-of-1.pt"
    rewrite(path, lambda document: document["base_lrs"].pop() and None)
    with pytest.raises(CheckpointError, match=r"base_lrs has 25 values, .* 26 parameters"):
        reshard(source, tmp_path / "out", tp=1)


def test_runs_that_are_not_nanotrons(tmp_path: Path) -> None:
    reshard(GOLDEN, tmp_path / "one", dp=2, zero_stage=1)
    path = tmp_path / "one" / "optimizer" / "optimizer_config.json"
    document = json.loads(path.read_text())
    offsets = document["configs"]["param_name_to_dp_rank_offsets"]
    name = next(iter(offsets))
    offsets[name]["0"] = ["0", "5"]
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"have the runs \[\(0, 5\).*over dp=2 are"):
        reshard(tmp_path / "one", tmp_path / "two")


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        app(arguments, standalone_mode=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["reshard", str(GOLDEN), str(tmp_path / "2"), "--tp", "1"]
    code, out, _ = run([*base, "--dry-run"], capsys)
    assert code == 0
    assert "states      tp=1 pp=1 dp=1 with zero_stage=0, was tp=2 pp=1" in out
    assert not list(tmp_path.iterdir())
    code, out, err = run([*base, "--dry-run", "--json"], capsys)
    assert json.loads(out)["source_states"]["tp"] == 2
    code, out, err = run([*base, "--quiet", "--workers", "1"], capsys)
    assert (code, out, err) == (0, "", "")
    assert (tmp_path / "latest.txt").read_text() == "2"
    code, out, err = run([*base, "--json", "--overwrite"], capsys)
    sizes = {"tp": 1, "pp": 1, "dp": 1, "zero_stage": 0, "ep": 1}
    assert json.loads(out)["states"] == sizes
    code, out, err = run([*base, "--ep", "2"], capsys)
    assert code == 2
    assert err.startswith("error: ep=2")
    assert err.count("\n") == 1
