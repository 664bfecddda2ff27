"""Ranks that die or fall silent: how the others end, and what can be gone on with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.checkpoints.test_processes import ranks
from tests.train.configs import save
from tests.train.runs import SIZES
from tests.train.test_trainer import assert_same, comparable, tensors_of

# The command, once something has been changed in it: what happens on the rank RANK.
CHANGED = """
import os, signal, sys, time
RANK = int(os.environ["RANK"])
from nanotron_fast.train import checkpoint, run, saver, trainer

def before(module, name, happens):
    inner = getattr(module, name)
    def changed(*args, **given):
        happens(*args, **given)
        return inner(*args, **given)
    setattr(module, name, changed)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

{change}
from nanotron_fast.__main__ import main
sys.argv[0] = "nanotron-fast"
main()
"""
DP: dict[str, Any] = {"parallelism__dp": 2, "optimizer__zero_stage": 1}
GONE = "since another process is gone, without a word"


def run(
    folder: Path, change: str = "", *, num_ranks: int = 2, env: Mapping[str, str] = {}, **more: Any
) -> list[forks.Result]:
    """Trains to step 6 into `folder`, a checkpoint every two steps, and goes on with what is there.

    Args:
        change: statements that make something happen.
    """
    parent = folder.parent
    changes = {
        **SIZES,
        "tokens__micro_batch_size": 1,
        "tokens__train_steps": 6,
        "data_stages__0__data__seed": 3,
        "checkpoints__checkpoint_interval": 2,
        "checkpoints__checkpoints_path": str(folder),
        "checkpoints__resume_checkpoint_path": str(folder),
        **more,
    }
    script = parent / "changed.py"
    script.write_text(CHANGED.format(change=change))
    config = save(parent / f"{folder.name}.yaml", **changes)
    environments = [{**each, **env, "PYTHONPATH": str(forks.ROOT)} for each in ranks(num_ranks)]
    return forks.run([script, "train", config, "--quiet"], environments, parent, 90)


def check_gone_on_with(folder: Path, **changes: Any) -> None:
    """What a run came to that is gone on with is what one comes to that nothing has happened to."""
    straight = folder.with_name("straight")
    for each in (folder, straight):
        assert [result.code for result in run(each, **changes)] == [0, 0]
        assert (each / "latest.txt").read_text() == "6"
        assert not list(each.glob(".*"))
    assert_same(tensors_of(folder / "6"), tensors_of(straight / "6"))
    assert comparable(folder) == comparable(straight)


@pytest.mark.slow
def test_a_signal_to_one_rank_while_both_save(tmp_path: Path) -> None:
    """It is no failure of the save on that rank alone, for which the other would wait for ever."""
    waits = """
import threading
from nanotron_fast.checkpoints import processes
def signalled(*_):
    if threading.current_thread().name == "checkpoint":
        os.kill(os.getpid(), signal.SIGINT)
if RANK == 0:
    before(checkpoint, "publish", lambda *_, **__: time.sleep(1))
else:
    before(processes, "wait", signalled)
"""
    first, second = run(tmp_path / "run", waits, **DP)
    assert (first.code, second.code) == (70, 130), first.err + second.err
    assert GONE in first.err
    assert "interrupted by SIGINT: after step" in second.err
    check_gone_on_with(tmp_path / "run", **DP)


@pytest.mark.slow
def test_a_rank_of_a_pipeline_dies(tmp_path: Path) -> None:
    """What torch says of a stage that failed is not what happened."""
    layout = {"parallelism__pp": 2, "parallelism__tp": 2}
    dies = "if RANK == 3:\n    before(checkpoint, '_write_document', die)"
    results = run(tmp_path / "run", dies, num_ranks=4, **layout)
    assert [each.code for each in results] == [70, 70, 70, -9]
    for rank, each in enumerate(results[:3]):
        assert each.err.startswith(f"error: rank {rank} ends, {GONE}"), each.err
        assert each.err.count("\n") == 1, each.err
    # It was at its first checkpoint. Where the first rank has not noticed that while it saved, but
    # in the step after, something of it is left, which is in nobody's way.
    assert len(list((tmp_path / "run").glob(".*.partial"))) <= 1
    assert [each.code for each in run(tmp_path / "run", parallelism__pp=2)] == [0, 0]
    assert not list((tmp_path / "run").glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_dies_before_the_first_step(tmp_path: Path, victim: int) -> None:
    dies = f"if RANK == {victim}:\n    before(trainer, 'architecture', die)"
    results = run(tmp_path / "run", dies, **DP)
    other = results[1 - victim]
    assert (results[victim].code, other.code) == (-9, 70), other.err
    assert other.err.startswith(f"error: rank {1 - victim} ends, {GONE}")
    assert not os.path.exists(tmp_path / "run")


# Torch's limit, which is half an hour.
LIMIT = """
import datetime
from torch.distributed import distributed_c10d
limit = datetime.timedelta(seconds=3)
distributed_c10d._get_default_timeout = lambda backend: limit
"""


@pytest.mark.slow
def test_a_rank_falls_silent(tmp_path: Path) -> None:
    silent = LIMIT + "if RANK == 1: before(run.Run, '_step', lambda *_: time.sleep(5))"
    first, second = run(tmp_path / "run", silent, **DP)
    assert (first.code, second.code) == (70, 70)
    assert first.err == (
        "error: rank 0 ends, since another process has not answered for as long as one waits\n"
    )


@pytest.mark.slow
def test_a_rank_that_takes_long_before_the_first_step_is_waited_for(tmp_path: Path) -> None:
    """As the first does that makes tokens of all text, or fetches a model."""
    slow = LIMIT + "if RANK == 0: before(trainer, 'batches_of', lambda *_, **__: time.sleep(4))"
    results = run(tmp_path / "run", slow, tokens__train_steps=1, **DP)
    assert [each.code for each in results] == [0, 0], results[1].err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--tokens.train_steps=8", "--tokens.train_steps is 8 on one rank, and 6 on the first"),
        ("--tokens.train_stepz=8", "--tokens.train_stepz is not known"),
    ],
)
def test_a_rank_with_a_configuration_of_its_own(tmp_path: Path, option: str, told: str) -> None:
    own = f"if RANK == 1: sys.argv.append({option!r})"
    first, second = run(tmp_path / "run", own, **DP)
    assert (first.code, second.code, first.err) == (2, 2, "")
    assert second.err.startswith(f"error: {told}"), second.err
    assert second.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_that_sees_another_checkpoint(tmp_path: Path) -> None:
    """As a mount shows it that has kept what was there before."""
    root = tmp_path / "run"
    assert [each.code for each in run(root, **DP, tokens__train_steps=4)] == [0, 0]
    option = f"--checkpoints.resume_checkpoint_path={root}/2"
    older = f"if RANK == 1: sys.argv.append({option!r})"
    first, second = run(root, older, **DP)
    assert (first.code, second.code, first.err) == (2, 2, "")
    assert second.err == (
        f"error: one rank would go on after step 2 ({root}/2), and the first after step 4: they "
        "have to see the same checkpoints\n"
    )
    assert len(comparable(root)) == 4
