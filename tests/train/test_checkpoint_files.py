"""What a checkpoint of a run holds, that it is whole or not there, and what is refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanotron_fast.checkpoints.convert import convert
from nanotron_fast.checkpoints.reshard import reshard
from nanotron_fast.errors import CheckpointError, ConfigError, TopologyError
from nanotron_fast.formats.nanotron.checkpoint import read_nanotron, resolve_latest
from nanotron_fast.formats.nanotron.optimizer import (
    Described,
    config_document,
    lr_scheduler_path,
    optimizer_path,
    runs_of,
)
from nanotron_fast.parallel.pipeline import check_schedule
from nanotron_fast.train.checkpoint import Snapshot, publish, write
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer_files import place_of, sizes_of
from nanotron_fast.train.optimizer_states import StoredStates, load_states
from nanotron_fast.train.start import METADATA, _read_metadata
from tests.train.engine import HIDDEN, VOCAB, Case, Run, rate
from tests.train.resuming import save_run

CPU = torch.device("cpu")
# What a run of Nanotron 0.4 has in its files.
GROUP_KEYS = {
    *("lr", "weight_decay", "betas", "eps", "amsgrad", "maximize", "foreach", "capturable"),
    *("differentiable", "fused", "decoupled_weight_decay", "initial_lr", "params"),
}
SCHEDULER_KEYS = {
    *("base_lrs", "last_epoch", "_step_count", "_is_initial", "_get_lr_called_within_step"),
    *("_last_lr", "lr_lambdas"),
}
FILE = "optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt"


@pytest.fixture(scope="module")
def run() -> Run:
    torch.set_num_threads(1)
    run = Run(Case())
    run.steps(0, 2)
    return run


@pytest.fixture
def saved(run: Run, tmp_path: Path) -> Path:
    return save_run(run, tmp_path, 2)


def test_the_files_are_those_of_nanotron(run: Run, saved: Path) -> None:
    document = torch.load(saved / "optimizer" / FILE, weights_only=True)
    names = [name for name, _ in run.parts[0].named_parameters()]
    assert set(document) == {"state", "param_groups", "names", "gradient_accumulator"}
    assert document["names"] == dict(enumerate(names))
    assert list(document["gradient_accumulator"]) == names
    for index, name in enumerate(names):
        tensor = run.parts[0].get_parameter(name)
        state, group = document["state"][index], document["param_groups"][index]
        assert set(group) == GROUP_KEYS
        assert group["params"] == [index]
        assert (group["lr"], group["initial_lr"]) == (rate(2, 3e-3), 3e-3)
        assert group["weight_decay"] == (0.0 if "norm" in name or "lm_head" in name else 0.1)
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"].dtype == torch.float32
        assert state["step"].shape == ()
        assert state["step"] == 2
        assert state["exp_avg"].shape == tensor.shape
        assert torch.equal(document["gradient_accumulator"][name], tensor)
    scheduler = torch.load(
        saved / "lr_scheduler" / "lr_scheduler_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt",
        weights_only=True,
    )
    assert set(scheduler) == SCHEDULER_KEYS
    assert (scheduler["last_epoch"], scheduler["_step_count"]) == (2, 3)
    assert scheduler["_last_lr"] == [rate(2, 3e-3)] * len(names)
    assert json.loads((saved / "optimizer" / "optimizer_config.json").read_text()) == {
        "type": "OptimizerFromGradientAccumulator",
        "parallelism": {
            "tp_size": "1",
            "dp_size": "1",
            "pp_size": "1",
            "expert_parallel_size": "1",
        },
        "configs": {},
    }
    assert read_nanotron(resolve_latest(saved.parent)).tp == 1


def test_ranks_and_runs_in_names_and_configuration() -> None:
    mesh = Mesh(dp=4, pp=2, tp=2, rank=(1 * 4 + 3) * 2 + 1, device=CPU)
    assert (mesh.pp_rank, mesh.dp_rank, mesh.tp_rank) == (1, 3, 1)
    place, sizes = place_of(mesh, zero_stage=1), sizes_of(mesh, zero_stage=1)
    assert optimizer_path(place, sizes) == (
        "optimizer/optimizer_pp-1-of-2_dp-3-of-4_tp-1-of-2_exp-0-of-1.pt"
    )
    assert lr_scheduler_path(place, sizes) == (
        "lr_scheduler/lr_scheduler_pp-1-of-2_tp-1-of-2_exp-0-of-1.pt"
    )
    described = [Described("norm", tuple(runs_of(3, 4)), (3,))]
    config = config_document(described, sizes)
    assert config["type"] == "ZeroDistributedOptimizer"
    assert config["configs"] == {
        "param_name_to_dp_rank_offsets": {
            "norm": {"0": ["0", "1"], "1": ["1", "2"], "2": ["2", "3"]}
        },
        "orig_param_shapes": {"norm": ["3"]},
    }


@pytest.mark.parametrize(("count", "dp"), [(8, 2), (7, 2), (5, 4), (3, 4), (1, 3), (10, 3), (0, 2)])
def test_runs_are_as_even_as_can_be_and_the_last_are_shorter(count: int, dp: int) -> None:
    runs = runs_of(count, dp)
    lengths = [end - first for first, end in runs]
    assert [first for first, _ in runs] == [0, *[end for _, end in runs[:-1]]]
    assert sum(lengths) == count
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


def test_a_checkpoint_of_the_same_step_is_replaced(run: Run, saved: Path) -> None:
    (saved / "left_over").touch()
    partial = saved.with_name(".2.partial")
    shutil.copytree(saved, partial)
    (partial / "left_over").unlink()
    publish(saved.parent, partial, 2, fsync=False)
    assert not (saved / "left_over").exists()
    assert sorted(os.listdir(saved.parent)) == ["2", "latest.txt"]


def test_a_save_that_is_killed_leaves_the_last_checkpoint(run: Run, saved: Path) -> None:
    """At fifty moments, the step that is there already among those that are saved."""
    root = saved.parent
    stored = StoredStates(saved)
    assert stored.num_steps() == 2
    began = time.perf_counter()
    save_run(run, root, 3)
    seconds = min(time.perf_counter() - began, 0.5)
    moments = random.Random(0)
    num_killed = 0
    for number in range(50):
        pid = os.fork()
        if pid == 0:
            try:
                save_run(run, root, 3 + number % 2)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        num_killed += os.WIFSIGNALED(status)
        latest = resolve_latest(root)
        assert read_nanotron(latest).params
        assert StoredStates(latest).num_steps() == 2
        assert (latest / "checkpoint_metadata.json").is_file()
    assert num_killed > 10


def test_a_file_that_cannot_be_written_leaves_the_last_checkpoint(
    run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "optimizer")

    monkeypatch.setattr("nanotron_fast.train.checkpoint.write_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_run(run, saved.parent, 3)
    assert resolve_latest(saved.parent) == saved
    assert not (saved.parent / "3").exists()


@pytest.mark.parametrize("kind", ["document", "tensor"])
def test_a_full_disk_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    values = torch.zeros(1000)
    taken = Snapshot(tensors=[("full", b"header", values)])
    if kind == "document":
        taken = Snapshot(documents={"full": {"values": values}})
    with pytest.raises(OSError, match=r"No space left on device: '.*/full'"):
        write(tmp_path, taken, fsync=False)


def remove(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name("optimizer_pp-0-of-1_tp-0-of-2_exp-0-of-1.pt"))


def spoil(path: Path) -> None:
    path.write_bytes(b"not a file of torch's")


def change(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        document = torch.load(path, weights_only=True)
        edit(document)
        torch.save(document, path)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "there are no states of an optimizer in it"),
        (rename, "1 files of tp=2 pp=1, which has 2; some are missing"),
        (spoil, f"{FILE}: it is not a zip file, which torch.save writes"),
        (change(lambda found: found.pop("names")), f"{FILE}: it lacks names"),
        (
            change(lambda found: found["names"].pop(3)),
            f"{FILE}: its names are not those .*: there are no names of the states 3",
        ),
        (
            change(lambda found: found["state"].pop(3)),
            f"{FILE}: its names are not those .*: there are no states of the names 3",
        ),
        (
            change(lambda found: [found[key].pop(3) for key in ("names", "state")]),
            "there are no states of .*o_proj",
        ),
        (
            change(lambda found: found["state"][0].pop("exp_avg")),
            f"{FILE}: .*token_embedding.weight has no exp_avg",
        ),
        (
            change(lambda found: found["state"][0].update(exp_avg=torch.zeros(2, 2))),
            rf"exp_avg of .* has shape \[2, 2\], and the model calls for \[{VOCAB}, {HIDDEN}\]",
        ),
        (
            change(lambda found: found["state"][1].update(step=torch.tensor(7.0))),
            r"its parameters took \[2, 7\] steps",
        ),
    ],
)
def test_damaged_states_are_named(
    run: Run, saved: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(saved / "optimizer" / FILE)
    fresh = Run(run.case)
    with pytest.raises(CheckpointError, match=message):
        load_states(saved, fresh.optimizer, fresh.mesh)


def test_one_group_of_constants_for_all_parameters(run: Run, saved: Path, tmp_path: Path) -> None:
    """As the released 0.4 has it: a run goes on, masters are exported, and states not resharded."""

    def join(found: dict) -> None:
        indices = [index for group in found["param_groups"] for index in group["params"]]
        found["param_groups"] = [{**found["param_groups"][0], "params": indices}]

    change(join)(saved / "optimizer" / FILE)
    fresh = Run(run.case)
    load_states(saved, fresh.optimizer, fresh.mesh)
    assert fresh.optimizer.num_steps == 2
    convert(saved, tmp_path / "hf", master_weights=True)
    with pytest.raises(
        CheckpointError, match=rf"{FILE}: a group of constants is of \d+ parameters"
    ):
        reshard(saved, tmp_path / "out", tp=2)


def test_what_schedules_cannot_run() -> None:
    check_schedule("afab", 1, pp=4)
    with pytest.raises(ConfigError, match="'zbv' is not served: they compute the gradients of"):
        check_schedule("zbv", 8, pp=2)
    with pytest.raises(ConfigError, match="choose afab, 1f1b, interleaved"):
        check_schedule("fastest", 8, pp=2)
    with pytest.raises(ConfigError, match="1f1b: 3 micro-batches for 4 stages"):
        check_schedule("1f1b", 3, pp=4)
    with pytest.raises(ConfigError, match="5 micro-batches do not divide into 2 equal rounds"):
        check_schedule("interleaved", 5, pp=2, chunks=2)
    with pytest.raises(ConfigError, match="2 stages on each rank: choose the schedule interleaved"):
        check_schedule("1f1b", 4, pp=2, chunks=2)


def test_ranks_that_were_not_started_are_counted() -> None:
    with pytest.raises(
        TopologyError, match=re.escape("dp=2 pp=2 tp=1 are 4 ranks, and 1 process was started")
    ):
        Mesh.connect(dp=2, pp=2)


def test_rows_that_do_not_divide(run: Run) -> None:
    ids = torch.zeros(3, 16, dtype=torch.int64)
    with pytest.raises(TopologyError, match="3 rows do not divide into micro-batches of 2"):
        run.pipeline.step(ids, ids, micro_batch_size=2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "it is None"),
        ('{"metas": 3}', "it is 3"),
        ('{"metas": {"last_train_step": "x"}}', "it is {'last_train_step': 'x'}"),
        (
            '{"metas": {"last_train_step": 1, "data_stages": [{"start_training_step": 1}]}}',
            "it is {'last_train_step': 1, 'data_stages': [{'start_training_step': 1}]}",
        ),
        (json.dumps({"metas": "x" * 300}), f"it is '{199 * 'x'} ..."),
    ],
)
def test_metadata_that_say_too_little(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / METADATA
    path.write_text(text)
    with pytest.raises(CheckpointError) as raised:
        _read_metadata(path)
    assert str(raised.value) == (
        f"{path}: metas should have last_train_step, and consumed_train_samples of each data "
        f"stage, each a count: {told}"
    )
