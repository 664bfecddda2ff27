"""A run in one process: what it writes, how it goes on, how it ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nanotron_fast.checkpoints.verify import verify
from nanotron_fast.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TopologyError,
    TrainingError,
)
from nanotron_fast.interruption import Interrupted
from nanotron_fast.train import Trainer, TrainingResult
from nanotron_fast.train import checkpoint as saving
from nanotron_fast.train import run as running
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.metrics import read_metrics
from tests.modelzoo import FAMILIES, make
from tests.parallel.ranks import ROOT, run_ranks
from tests.train.data.material import write_tokens
from tests.train.runs import config, train


def stage(name: str, start: int, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "start_training_step": start,
        "data": {"dataset": None, "seed": start},
        **more,
    }


def tensors_of(folder: Path) -> dict[str, Any]:
    """Every value of a checkpoint's weights and of its optimizer."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found[str(path.relative_to(folder))] = path.read_bytes()
    for path in sorted(folder.rglob("*.pt")):
        found[str(path.relative_to(folder))] = torch.load(path, weights_only=True)
    return found


def assert_same(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}/{key}")
    else:
        assert one == other, where


def comparable(root: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what its clock says."""
    timed = ("tokens_per_second", "mfu", "memory_bytes", "seconds")
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in read_metrics(root / "metrics.jsonl")
    ]


def test_a_run_in_two_halves_is_the_straight_run(tmp_path: Path) -> None:
    """With a validation and a data stage's change in between, bit for bit."""
    changes: dict[str, Any] = {
        "data_stages": [stage("short", 1), stage("long", 5, sequence_length=24)],
        "tokens__val_check_interval": 2,
        "tokens__limit_val_batches": 1,
        "tokens__train_steps": 6,
        "optimizer__learning_rate_scheduler": {
            "learning_rate": 1e-3, "lr_warmup_steps": 2, "lr_decay_style": "cosine",
            "min_decay_lr": 1e-4,
        },
    }  # fmt: skip
    straight = train(tmp_path / "straight", **changes)
    assert straight.step == 6
    assert straight.checkpoint == tmp_path / "straight" / "6"

    root = tmp_path / "halves"
    changes["checkpoints__resume_checkpoint_path"] = str(root)
    # The first half does not know that it is one: the schedule is that of the whole run.
    with signalled_after(3):
        first = train(root, **changes)
    assert (first.step, first.stopped_by) == (3, "SIGUSR1")
    assert (root / "latest.txt").read_text() == "3"
    second = train(root, **changes)
    assert second == TrainingResult(6, straight.loss, straight.validation_loss, root / "6", None)
    lines = comparable(root)
    assert lines == comparable(tmp_path / "straight")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["validation_loss" in line for line in lines] == [False, True] * 3
    assert [line["tokens"] for line in lines] == [64, 128, 192, 256, 352, 448]
    assert lines[0]["learning_rate"] == 0.0
    assert_same(tensors_of(root / "6"), tensors_of(tmp_path / "straight" / "6"))
    stages = json.loads((root / "6" / "checkpoint_metadata.json").read_text())["metas"]
    assert [each["consumed_train_samples"] for each in stages["data_stages"]] == [16, 8]


def test_a_run_says_from_where_it_goes_on_and_what_its_data_lack(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    write_tokens(tmp_path / "tokens", "a.ds", [[*range(2, 36)]])
    changes: dict[str, Any] = {
        "checkpoints__resume_checkpoint_path": str(root),
        "data_stages__0__data__dataset": {"dataset_folder": str(tmp_path / "tokens")},
    }
    for last in (1, 2):
        read = config(root, tokens__train_steps=last, **changes)
        Trainer(read, device="cpu").run()
        told = capfd.readouterr().err
        assert (f"resuming: {root / '1'}, after step 1 of 2\n" in told) is (last == 2)
        assert f"note: data stage 'only' takes {4 * last} samples of 16 tokens" in told


@contextmanager
def signalled_after(step: int) -> Iterator[None]:
    """Sends this process SIGUSR1 when a step has been taken."""
    inner = running.Run._step

    def stepping(run: Any, number: int, batch: Any) -> Any:
        result = inner(run, number, batch)
        if number == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.Run, "_step", stepping)
        yield


def test_signals_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    train(tmp_path, tokens__train_steps=1)
    assert before == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_from_hugging_face_and_back_without_a_step(tmp_path: Path, family: str) -> None:
    source = make(family).save(tmp_path / "hf")
    result = train(
        tmp_path / "run",
        model={"init_method": {"path": str(source)}, "dtype": "bfloat16"},
        tokens__train_steps=0,
        checkpoints__export_hf=True,
    )
    assert result == TrainingResult(0, None, None, tmp_path / "run" / "0", None)
    exported = result.checkpoint / "hf"
    assert verify(source, exported).equal
    assert verify(source, result.checkpoint).equal
    before, after = (json.loads((each / "config.json").read_text()) for each in (source, exported))
    for key in set(before) - {"torch_dtype", "dtype", "transformers_version"}:
        assert after.get(key) == before[key], key


def test_what_is_ours_is_not_in_the_yaml(tmp_path: Path) -> None:
    train(
        tmp_path,
        tokens__train_steps=3,
        checkpoints__checkpoint_interval=1,
        checkpoints__keep_last=2,
        optimizer__optimizer_factory={"name": "muon"},
    )
    assert sorted(os.listdir(tmp_path)) == ["2", "3", "latest.txt", "metrics.jsonl"] + (
        ["tensorboard"] if (tmp_path / "tensorboard").exists() else []
    )
    written = yaml.safe_load((tmp_path / "3" / "config.yaml").read_text())
    assert "keep_last" not in written["checkpoints"]
    assert written["optimizer"]["optimizer_factory"]["name"] == "adamW"
    ours = json.loads((tmp_path / "3" / "nanotron_fast.json").read_text())["training"]
    assert ours["checkpoints"] == {"keep_last": 2}
    assert ours["optimizer"]["optimizer_factory"]["name"] == "muon"


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "tokens__train_steps": 6,
        "checkpoints__checkpoint_interval": 2,
        "optimizer__learning_rate_scheduler": {"learning_rate": 1e-3},
    }
    patch = pytest.MonkeyPatch()
    inner = running.Run._step

    def stepping(run: Any, number: int, batch: Any) -> Any:
        if number == 5:
            with torch.no_grad():
                next(run.engine.parts[0].parameters()).fill_(float("nan"))
        return inner(run, number, batch)

    patch.setattr(running.Run, "_step", stepping)
    with pytest.raises(TrainingError, match=r"step 5: the loss is nan.*/4 is the last checkpoint"):
        train(tmp_path, **changes)
    patch.undo()
    assert (tmp_path / "latest.txt").read_text() == "4"
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["step"] == 5
    assert lines[-1]["loss"] is None
    again = train(tmp_path, checkpoints__resume_checkpoint_path=str(tmp_path), **changes)
    assert again.step == 6
    assert again.loss is not None


@pytest.mark.parametrize(
    ("interval", "kept"),
    [(5, "{root} has no checkpoint yet"), (2, "{root}/2 is the last checkpoint")],
)
def test_what_remains_where_a_signal_ends_a_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int, kept: str
) -> None:
    inner = running.Run._step

    def stepping(run: Any, number: int, batch: Any) -> Any:
        if number == 4:
            run.saver.finished()
            raise Interrupted(signal.SIGINT)
        return inner(run, number, batch)

    monkeypatch.setattr(running.Run, "_step", stepping)
    with pytest.raises(Interrupted) as raised:
        train(tmp_path, tokens__train_steps=9, checkpoints__checkpoint_interval=interval)
    assert raised.value.remains == f"after step 3 of 9; {kept.format(root=tmp_path)}"


def test_a_disk_that_is_full_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = saving._write_document

    def writing(path: Path, contents: Any, *, fsync: bool) -> None:
        if "/.4." in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        inner(path, contents, fsync=fsync)

    monkeypatch.setattr(saving, "_write_document", writing)
    with pytest.raises(OSError, match=r"No space left.*\.4\.\w+\.partial"):
        train(tmp_path, tokens__train_steps=9, checkpoints__checkpoint_interval=2)
    assert (tmp_path / "latest.txt").read_text() == "2"
    # A disk that is full is not kept so.
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    resumed = train(
        tmp_path, tokens__train_steps=5, checkpoints__resume_checkpoint_path=str(tmp_path)
    )
    assert resumed.checkpoint == tmp_path / "5"
    assert not list(tmp_path.glob(".*"))


def test_a_new_run_does_not_write_over_another(tmp_path: Path) -> None:
    train(tmp_path / "run", tokens__train_steps=1)
    for changes in ({}, {"checkpoints__resume_checkpoint_path": str(tmp_path / "copy")}):
        if changes:
            (tmp_path / "run").joinpath("1").rename(tmp_path / "copy")
        with pytest.raises(ConfigError, match="has the checkpoints of a run already"):
            train(tmp_path / "run", tokens__train_steps=2, **changes)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    train(tmp_path / "run", tokens__train_steps=2)
    resume = "checkpoints__resume_checkpoint_path"
    with pytest.raises(
        CheckpointError, match=r"neither latest.txt nor a checkpoint.*no such folder"
    ):
        train(tmp_path / "new", **{resume: str(tmp_path / "missing")})
    with pytest.raises(
        ConfigError, match=r"train_steps is 1, .* after step 2: there is nothing left"
    ):
        train(tmp_path / "run", tokens__train_steps=1, **{resume: str(tmp_path / "run")})
    for path in (tmp_path / "run" / "2" / "optimizer").iterdir():
        path.unlink()
    changes = {resume: str(tmp_path / "run"), "tokens__train_steps": 3}
    with pytest.raises(CheckpointError, match=r"no states of an optimizer.*load_optimizer=false"):
        train(tmp_path / "run", **changes)
    assert train(tmp_path / "run", checkpoints__load_optimizer=False, **changes).step == 3


def test_without_latest_txt_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    changes = {"checkpoints__resume_checkpoint_path": str(tmp_path)}
    train(tmp_path, tokens__train_steps=4, checkpoints__checkpoint_interval=2, **changes)
    (tmp_path / "latest.txt").unlink()
    with pytest.raises(ConfigError, match="has the checkpoints of a run already"):
        train(tmp_path, tokens__train_steps=6)
    # One that is not whole has no metadata.
    (tmp_path / "5").mkdir()
    assert train(tmp_path, tokens__train_steps=6, **changes).step == 6
    assert [line["step"] for line in comparable(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_model_config_and_the_weights_are_one_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, tokens__train_steps=1)
    changes: dict[str, Any] = {
        "checkpoints__resume_checkpoint_path": str(tmp_path),
        "tokens__train_steps": 2,
    }
    for key, value, message in (
        ("num_hidden_layers", 2, "num_layers is 2, and .*/1 holds a model with 4"),
        ("vocab_size", 300, "vocab_size is 300, and .* with 512"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True"),
    ):
        with pytest.raises(ConfigError, match=rf"model\.model_config: {message}"):
            train(tmp_path, **changes, **{f"model__model_config__{key}": value})
    changes["model__model_config__rms_norm_eps"] = 0.01
    Trainer(config(tmp_path, **changes), device="cpu").run()
    assert "norm_eps is 0.01, and the model in" in capsys.readouterr().err


def test_what_was_reached_is_saved_when_the_data_end(tmp_path: Path) -> None:
    tokens = [torch.randint(512, (4, 17)) for _ in range(3)]
    with pytest.raises(DataError, match="end after 3"):
        train(tmp_path, batches=tokens, tokens__train_steps=9)
    assert (tmp_path / "latest.txt").read_text() == "3"
    assert [line["step"] for line in comparable(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "it is empty, and torch.save writes a zip file"),
        ({"state": {}, "names": {0: "x"}}, "there are no states of the names 0"),
        ({"state": {0: 3}, "names": {0: "x"}}, "not laid out .* AttributeError"),
        ({"state": {}}, "it lacks names"),
    ],
)
def test_a_damaged_optimizer_is_named(tmp_path: Path, contents: Any, message: str) -> None:
    train(tmp_path, tokens__train_steps=1)
    (path,) = (tmp_path / "1" / "optimizer").glob("*.pt")
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        torch.save(contents, path)
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path, tokens__train_steps=2, checkpoints__resume_checkpoint_path=str(tmp_path))


def test_a_run_stands_alone_when_it_is_resumed(tmp_path: Path) -> None:
    """What its weights came from may be gone."""
    source = make("llama").save(tmp_path / "hf")
    changes: dict[str, Any] = {
        "model": {"init_method": {"path": str(source)}, "dtype": "float32"},
        "checkpoints__resume_checkpoint_path": str(tmp_path / "run"),
    }
    train(tmp_path / "run", tokens__train_steps=1, **changes)
    source.rename(tmp_path / "moved")
    result = train(tmp_path / "run", tokens__train_steps=2, checkpoints__export_hf=True, **changes)
    exported = json.loads((result.checkpoint / "hf" / "config.json").read_text())
    original = json.loads((tmp_path / "moved" / "config.json").read_text())
    assert exported["architectures"] == original["architectures"]


def test_what_an_export_lacks_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is made in a folder of its own, whose name nobody has given."""
    changes = {"checkpoints__checkpoint_interval": 1, "checkpoints__export_hf": True}
    Trainer(config(tmp_path, tokens__train_steps=3, **changes), device="cpu").run()
    said = capsys.readouterr().err
    warning = (
        "warning: hf: no tokenizer is written: none lies in the checkpoint. Give it with "
        "tokenizer.tokenizer_name_or_path\n"
    )
    assert said.count(warning) == said.count("no tokenizer") == 1


def test_batches_of_the_user(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(512, (4, 17), generator=generator) for _ in range(4)]
    as_mappings = [{"input_ids": each[:, :-1], "labels": each[:, 1:]} for each in tokens]
    one = train(tmp_path / "one", batches=tokens, tokens__train_steps=4)
    train(tmp_path / "two", batches=iter(as_mappings), tokens__train_steps=2)
    two = train(
        tmp_path / "two",
        batches=as_mappings,
        tokens__train_steps=4,
        checkpoints__resume_checkpoint_path=str(tmp_path / "two"),
    )
    assert one.loss == two.loss
    assert [line["tokens"] for line in comparable(tmp_path / "two")] == [64, 128, 192, 256]
    with pytest.raises(DataError, match="end after 4, and step 5 needs one"):
        train(tmp_path / "three", batches=tokens, tokens__train_steps=5)
    for wrong, message in (
        (torch.zeros(3, 17, dtype=torch.int64), r"shape \(3, 16\): it should be \(4, length\)"),
        (torch.zeros(4, 17), "should be integers"),
        (torch.full((4, 17), 512), "token 512, which is not in the model's vocabulary of 512"),
        ({"input_ids": tokens[0]}, "keys .*input_ids.*: it should have input_ids, labels"),
    ):
        with pytest.raises(DataError, match=message):
            train(tmp_path / "wrong", batches=[wrong], tokens__train_steps=1)


def test_a_gpu_without_a_number_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device takes no other."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    Mesh.connect(device="cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Mesh.connect(device="cuda").device.index == 3
    Mesh.connect(device="cuda:1")
    assert [each.index for each in chosen] == [0, 3, 1]


def test_too_few_ranks(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="dp=2 x pp=1 x tp=1 are 2 ranks, and 1 was started"):
        train(tmp_path / "run", parallelism__dp=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_runs_on_two_ranks() -> None:
    run_ranks("tests.train.trainer_ranks", 2)


@pytest.mark.slow
def test_two_runs_in_one_process_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from tests.train.runs import train\n"
        "for number in range(2):\n"
        f"    root = Path({str(tmp_path)!r}) / str(number)\n"
        "    train(root, tokens__train_steps=1, parallelism__dp=2)\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *launch, str(script)], check=True, timeout=420, env=environment)
    assert [(tmp_path / str(number) / "latest.txt").read_text() for number in range(2)] == ["1"] * 2
