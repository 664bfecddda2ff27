"""Whether a run's checkpoints can be written is found out before its first step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nanotron_fast.errors import ConfigError
from nanotron_fast.train.architecture import architecture
from nanotron_fast.train.estimate import checkpoint_bytes
from tests.ordinary_user import ordinary_user
from tests.train.full_disk import no_file_beyond
from tests.train.runs import config, train

RESUME = "checkpoints__resume_checkpoint_path"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    folder.chmod(0o555)
    try:
        with ordinary_user():
            yield
    finally:
        folder.chmod(0o755)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(root, tokens__train_steps=1)
    before = (root / "metrics.jsonl").read_bytes()
    with (
        locked(root),
        pytest.raises(
            ConfigError,
            match=r"x\.yaml: checkpoints\.checkpoints_path is .*/run, where no checkpoint can be "
            r"written: Permission denied: .*/run/\.nanotron_fast\.[0-9a-f]*\.new$",
        ),
    ):
        train(root, tokens__train_steps=2, **{RESUME: str(root)})
    assert (root / "metrics.jsonl").read_bytes() == before
    with (
        locked(tmp_path),
        pytest.raises(ConfigError, match="/new, where no checkpoint can be written: Permission"),
    ):
        train(tmp_path / "new", tokens__train_steps=1)
    # There is nothing left to write.
    with locked(root):
        assert train(root, tokens__train_steps=1, **{RESUME: str(root)}).step == 1


def test_a_disk_that_is_full_already_is_left_as_it_was(tmp_path: Path) -> None:
    with (
        no_file_beyond(0),
        pytest.raises(ConfigError, match=r"written: File too large: .*/\.nanotron_fast\."),
    ):
        train(tmp_path, tokens__train_steps=1)
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = config(tmp_path / "run")
    needed = checkpoint_bytes(read, architecture(read))
    asked: list[Path] = []

    def usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage(10 * needed, 9 * needed, needed - 1)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(
        ConfigError,
        match=rf"/run, where {needed - 1:,} bytes are free, and a checkpoint takes {needed:,}",
    ):
        train(tmp_path / "run", tokens__train_steps=1)
    assert asked == [tmp_path / "run"]
    assert os.listdir(tmp_path / "run") == []
    # Whoever measures the speed alone saves nothing.
    unsaved = {"checkpoints__save_final_state": False, "tokens__train_steps": 2}
    assert train(tmp_path / "run", **unsaved).step == 2
    for key, value in (("checkpoint_interval", 2), ("save_initial_state", True)):
        with pytest.raises(ConfigError, match="bytes are free"):
            train(tmp_path / "run", **unsaved, **{f"checkpoints__{key}": value})


def test_a_file_system_that_knows_no_size_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    assert train(tmp_path, tokens__train_steps=1).checkpoint == tmp_path / "1"


def test_what_a_killed_run_left_takes_no_room(tmp_path: Path) -> None:
    for name in (".3.partial/model", ".3.hf.partial-0a1b2c3d/content"):
        (tmp_path / name).mkdir(parents=True)
    unsaved = {"checkpoints__save_final_state": False}
    train(tmp_path, tokens__train_steps=1, **unsaved)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__dtype": "bfloat16"},
        {"optimizer__optimizer_factory": {"name": "muon"}},
        {"checkpoints__export_hf": True, "model__model_config__tie_word_embeddings": True},
        {"optimizer__zero_stage": 1},
    ],
)
def test_the_bytes_of_a_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    sizes = {"model__model_config__vocab_size": 8192}
    changes = {**sizes, **changes, "tokens__train_steps": 0}
    read = config(tmp_path, **changes)
    folder = train(tmp_path, **changes).checkpoint
    assert folder is not None
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    counted = checkpoint_bytes(read, architecture(read))
    # Headers and small files come on top.
    assert counted < written < 1.05 * counted
