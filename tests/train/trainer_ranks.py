"""A rank of test_trainer.py: whole runs on two ranks, how they go on, and how they end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from nanotron_fast.checkpoints.convert import convert
from nanotron_fast.checkpoints.inspect import inspect
from nanotron_fast.checkpoints.processes import PeerFailed
from nanotron_fast.checkpoints.verify import verify
from nanotron_fast.cli import commands
from nanotron_fast.errors import ConfigError, DataError, MissingPackageError, TopologyError
from nanotron_fast.train import TrainingResult
from nanotron_fast.train import checkpoint as saving
from nanotron_fast.train import run as running
from nanotron_fast.train.config import agreement
from nanotron_fast.train.metrics import MetricsFile, read_metrics
from tests.modelzoo import make
from tests.parallel.ranks import join, run_cases
from tests.train import runs
from tests.train.configs import save

SIZES: dict[str, Any] = {
    **runs.SIZES,
    "tokens__micro_batch_size": 1,
    "optimizer__learning_rate_scheduler": {"learning_rate": 1e-3, "lr_decay_steps": 9},
}
TP: dict[str, Any] = {
    "parallelism__tp": 2,
    "parallelism__tp_mode": "REDUCE_SCATTER",
    "tokens__batch_accumulation_per_replica": 4,
}
DP: dict[str, Any] = {
    "parallelism__dp": 2,
    "optimizer__zero_stage": 1,
    "tokens__batch_accumulation_per_replica": 2,
}
PP: dict[str, Any] = {
    "parallelism__pp": 2,
    "parallelism__pp_engine": "interleaved",
    "tokens__batch_accumulation_per_replica": 4,
}


def train(root: Path, *, batches: Any = None, **changes: Any) -> TrainingResult:
    return runs.train(root, batches=batches, **{**SIZES, **changes})


def prepared(root: Path, prepare: Callable[[Path], object]) -> Path:
    """What the first rank makes for both."""
    if dist.get_rank() == 0:
        prepare(root)
    dist.barrier()
    return root


def goes_on_at_other_topologies(root: Path) -> None:
    rows = {**DP, "optimizer__zero_stage": 3}
    for vocab_size, pairs in ((160, ((rows, PP), (PP, TP))), (161, ((TP, DP),))):
        # The second has to be padded for tp=2, and stays so.
        folder = root / str(vocab_size)
        for number, (before, after) in enumerate(pairs):
            check_topologies(folder, folder / f"run-{number}", vocab_size, before, after)


def check_topologies(
    root: Path, run: Path, vocab_size: int, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Three steps at one topology and three at another, beside six at tp=2."""
    changes: dict[str, Any] = {
        "model": {"init_method": {"path": str(root / "hf")}, "dtype": "float32"},
        "data_stages": [
            {"name": "one", "start_training_step": 1, "data": {"dataset": None, "seed": 3}}
        ],
    }
    if not (root / "straight").exists():
        prepared(root / "hf", lambda path: make("llama", vocab_size=vocab_size).save(path))
        train(root / "straight", tokens__train_steps=6, **changes, **TP)
    expected = read_metrics(root / "straight" / "metrics.jsonl")
    changes["checkpoints__resume_checkpoint_path"] = str(run)
    train(run, tokens__train_steps=3, **changes, **before)
    result = train(run, tokens__train_steps=6, checkpoints__export_hf=True, **changes, **after)
    assert result.checkpoint == run / "6"
    for ours, theirs in zip(read_metrics(run / "metrics.jsonl"), expected, strict=True):
        for key in ("loss", "grad_norm"):
            error = abs(ours[key] - theirs[key]) / theirs[key]
            assert error <= 1e-6, f"{key} of step {ours['step']} of {run}: {error:.1e}"
        assert ours["tokens"] == theirs["tokens"]
    if dist.get_rank() == 0:
        differing = verify(run / "6", run / "6" / "hf").differing
        # What pads the vocabulary was trained too, as in Nanotron.
        assert all(each.name.endswith("(padding)") for each in differing), differing
        exported = json.loads((run / "6" / "hf" / "config.json").read_text())
        assert exported["vocab_size"] == vocab_size
    dist.barrier()


def ranks_beyond_key_value_heads(root: Path) -> None:
    """Both tensor-parallel ranks have a copy of the one head; then each has its own micro batch."""
    hf = prepared(root / "hf", lambda path: make("llama", num_key_value_heads=1).save(path))
    choices: Any = {"target": "nanotron-fast", "model_class": "nanotron-fast"}
    own = prepared(root / "own", lambda path: convert(hf, path, **choices))
    changes: dict[str, Any] = {
        "model": {"init_method": {"path": str(own)}, "dtype": "float32"},
        "data_stages": [
            {"name": "one", "start_training_step": 1, "data": {"dataset": None, "seed": 3}}
        ],
    }
    train(root / "straight", tokens__train_steps=4, **changes, **DP)
    run = root / "run"
    changes["checkpoints__resume_checkpoint_path"] = str(run)
    train(run, tokens__train_steps=2, **changes, **TP)
    train(run, tokens__train_steps=3, **changes, **TP)
    train(run, tokens__train_steps=4, **changes, **DP)
    expected = read_metrics(root / "straight" / "metrics.jsonl")
    for ours, theirs in zip(read_metrics(run / "metrics.jsonl"), expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-6), (key, ours["step"])
    if dist.get_rank() == 0:
        assert inspect(run / "3").kv_head_copies == 2
    changes["model"] = {"init_method": {"path": str(hf)}, "dtype": "float32"}
    del changes["checkpoints__resume_checkpoint_path"]
    error, message = (TopologyError, PeerFailed), r"1 kv heads .* --target nanotron-fast --tp 2 "
    with pytest.raises(error, match=message):
        train(root / "stock", tokens__train_steps=1, **changes, **TP)


def a_signal_to_one_rank_ends_both(root: Path) -> None:
    inner = running.Run._step

    def stepping(run: Any, number: int, batch: Any) -> Any:
        result = inner(run, number, batch)
        if number == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.Run, "_step", stepping)
        result = train(root, tokens__train_steps=9, **DP)
    assert (result.step, result.checkpoint) == (2, root / "2")
    assert result.stopped_by == "SIGTERM"


def a_rank_without_data_ends_both(root: Path) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
    count = 4 - dist.get_rank()
    batches = [torch.randint(512, (2, 17), generator=generator) for _ in range(count)]
    error = (DataError, "end after 3") if dist.get_rank() == 1 else (PeerFailed, "rank 1 failed")
    with pytest.raises(error[0], match=error[1]):
        train(root, batches=batches, tokens__train_steps=4, **DP)


def what_fails_on_one_rank_after_a_step_ends_both(root: Path) -> None:
    """Figures that cannot be written, a validation that cannot be read."""

    def full(file: MetricsFile, metrics: Any) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    def unreadable(run: Any, step: int) -> list[Any]:
        if dist.get_rank() == 1:
            raise DataError("nothing to validate with")
        return []

    for number, (holder, name, planted, message, teller) in enumerate(
        (
            (MetricsFile, "write", full, "No space left", 0),
            (running.Run, "_held_out", unreadable, "nothing to validate with", 1),
        )
    ):
        error = (Exception, message) if dist.get_rank() == teller else (PeerFailed, "has said why")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(holder, name, planted)
            with pytest.raises(error[0], match=error[1]):
                train(root / str(number), tokens__train_steps=3, **DP)
        # What was reached is saved.
        assert (root / str(number) / "latest.txt").read_text() == ("2" if number == 0 else "1")


def a_rank_whose_disk_is_full_ends_both(root: Path) -> None:
    inner = saving._write_document

    def writing(path: Path, contents: Any, *, fsync: bool) -> None:
        if "/.4." in str(path) and dist.get_rank() == 1:
            raise OSError(28, "No space left on device", str(path))
        inner(path, contents, fsync=fsync)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_write_document", writing)
        error = (
            (OSError, "No space left") if dist.get_rank() == 1 else (PeerFailed, "rank 1 failed")
        )
        with pytest.raises(error[0], match=error[1]):
            train(root, tokens__train_steps=9, checkpoints__checkpoint_interval=2, **DP)
    assert (root / "latest.txt").read_text() == "2"
    dist.barrier()
    assert not list(root.glob(".*"))


def a_disk_without_room_ends_both_before_the_first_step(root: Path) -> None:
    """The first rank looks, and no other."""
    asked = Mock(return_value=Mock(free=10))
    error = (ConfigError, "10 bytes are free") if dist.get_rank() == 0 else (PeerFailed, "10 bytes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", asked)
        with pytest.raises(error[0], match=error[1]):
            train(root, tokens__train_steps=1, **DP)
    assert asked.call_count == (1 if dist.get_rank() == 0 else 0)
    assert not (root / "metrics.jsonl").exists()


def configurations_that_differ_are_refused(root: Path) -> None:
    """Also where the groups of ranks would be others, and making them would not end."""
    own: tuple[dict[str, Any], dict[str, Any]]
    for own, told in (
        ((DP, TP), "optimizer.zero_stage is 0 on one rank, and 1 on the first"),
        (({**DP}, {**DP, "general__seed": 7}), "general.seed is 7 on one rank, and 42 on the"),
        ((DP, {**DP, "parallelism__dp": 1}), "parallelism.dp is 1 on one rank, and 2 on the"),
    ):
        error = PeerFailed if dist.get_rank() == 0 else ConfigError
        with pytest.raises(error, match=told):
            train(root / "run", tokens__train_steps=1, **own[dist.get_rank()])
    assert not (root / "run").exists()


def packages_that_differ_are_refused(root: Path) -> None:
    """What is common to ranks would drift apart by what each rounds."""
    error = PeerFailed if dist.get_rank() == 0 else MissingPackageError
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(agreement, "__version__", "9.9")
        with pytest.raises(error, match=r"nanotron_fast is 9\.9 on one rank, and 0.* on the"):
            train(root / "run", tokens__train_steps=1, **DP)
    assert not (root / "run").exists()


def a_run_leaves_no_connection_of_its_own(root: Path) -> None:
    """Those that ranks agree over and save by; a script may train a hundred times."""
    inner, made = dist.new_group, []

    def making(*given: Any, **options: Any) -> dist.ProcessGroup:
        made.append(inner(*given, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", making)
        train(root, tokens__train_steps=1, **DP)
    assert len(made) == 2
    for group in made:
        with pytest.raises(ValueError, match="not registered"):
            dist.get_rank(group)


def the_command_says_an_error_once(root: Path) -> None:
    """Whatever is wrong with the configuration, the data or the ranks: exit code 2, no hang."""
    root.mkdir(exist_ok=True)
    text = root / "text.txt"
    prepared(text, lambda path: path.write_text("a b c\n" * 99))
    tokenizer = str(Path(__file__).parents[1] / "golden" / "llama_tied" / "hf")
    dataset = {"dataset": {"hf_dataset_or_datasets": str(text)}, "seed": 1}
    stages = [{"name": "one", "start_training_step": 1, "data": dataset}]
    read = {"tokenizer__tokenizer_name_or_path": tokenizer, "data_stages": stages}
    small = {"model__model_config__vocab_size": 64}
    missing = {"tokenizer__tokenizer_name_or_path": tokenizer, "data_stages": [
        {**stages[0], "data": {**dataset, "dataset": {"hf_dataset_or_datasets": f"{root}/no.txt"}}}
    ]}  # fmt: skip
    for number, (changes, words) in enumerate(
        (
            ({"tokens__train_stepz": 3}, "train_stepz"),
            ({"parallelism__dp": 4}, "are 4 ranks, and 2 were started"),
            ({**DP, **read, **small}, "its vocabulary is"),
            ({**DP, **missing}, "no.txt"),
        )
    ):
        changes = {**SIZES, "checkpoints__checkpoints_path": f"{root}/run-{number}", **changes}
        path = prepared(root / f"{number}.yaml", partial(save, **changes))
        code, said = command(["train", str(path), "--quiet"])
        assert code == 2, said
        assert (words in said) is (dist.get_rank() == 0), (number, said)
        assert (said == "") is (dist.get_rank() > 0), said
    # Where one machine's command has another number of ranks, it is told what the first has.
    changes = {**SIZES, **DP, "checkpoints__checkpoints_path": f"{root}/own"}
    path = prepared(root / "own.yaml", partial(save, **changes))
    own = ["--parallelism.dp=1"] * (dist.get_rank() > 0)
    code, said = command(["train", str(path), "--quiet", *own])
    assert code == 2, said
    told = "parallelism.dp is 1 on one rank, and 2 on the first"
    assert (told in said) is (dist.get_rank() > 0), said
    assert (said == "") is (dist.get_rank() == 0), said


def the_command_trains(root: Path) -> None:
    root.mkdir(exist_ok=True)
    changes = {**SIZES, **TP, "checkpoints__checkpoints_path": f"{root}/run"}
    path = prepared(root / "good.yaml", partial(save, **changes))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code, said = command(["train", str(path), "--tokens.train_steps=2", "--json"])
    assert (code, said) == (0, "")
    if dist.get_rank() > 0:
        assert out.getvalue() == ""
    else:
        assert json.loads(out.getvalue())["checkpoint"] == f"{root}/run/2"


def command(words: list[str]) -> tuple[int, str]:
    """The exit code of nanotron-fast and what it says on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            commands.app(words, prog_name="nanotron-fast")
        except SystemExit as ended:
            return int(ended.code or 0), err.getvalue()
    raise AssertionError("the command has not ended")


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    root = Path(os.environ["RANKS_STORE"]).parent
    for number, check in enumerate(
        (
            goes_on_at_other_topologies,
            ranks_beyond_key_value_heads,
            a_signal_to_one_rank_ends_both,
            a_rank_without_data_ends_both,
            what_fails_on_one_rank_after_a_step_ends_both,
            a_rank_whose_disk_is_full_ends_both,
            a_disk_without_room_ends_both_before_the_first_step,
            configurations_that_differ_are_refused,
            packages_that_differ_are_refused,
            a_run_leaves_no_connection_of_its_own,
            the_command_says_an_error_once,
            the_command_trains,
        )
    ):
        folder = root / f"case-{number}"
        folder.mkdir(exist_ok=True)
        yield check.__name__, partial(check, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    join()
    run_cases(cases())
