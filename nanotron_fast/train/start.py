"""Where a run begins: at its first step, or after the last of a checkpoint that it resumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.source import resolve
from nanotron_fast.errors import CheckpointError, ConfigError
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron.checkpoint import (
    LATEST,
    METADATA,
    MODEL_CONFIG,
    is_nanotron_checkpoint,
)
from nanotron_fast.train.config import TrainingConfig
from nanotron_fast.train.data import Consumed


@dataclass(frozen=True, slots=True)
class Start:
    """What was done before a run.

    Args:
        folder: of the checkpoint that is resumed; None for a new run.
        step: the last one that was taken.
        consumed: samples of each data stage until then.
    """

    folder: Path | None = None
    step: int = 0
    consumed: Consumed = field(default_factory=Consumed)

    def check_is_after(self, step: int) -> None:
        """Refuses another start than the first rank's, as where a mount shows an older state.

        Raises CheckpointError.
        """
        if self.step != step:
            raise CheckpointError(
                f"one rank would go on after step {self.step} ({self.folder or 'a new run'}), and "
                f"the first after step {step}: they have to see the same checkpoints"
            )

    def check_is_still(self, config: TrainingConfig) -> None:
        """Refuses a start that is none any more, for a run that has just claimed its folder.

        The one that had it may have saved after this one looked; one that lives in another folder,
        which this one goes on from, may do so. Raises CheckpointError, ConfigError, OSError.
        """
        found, root = find_start(config), Path(config.checkpoints.checkpoints_path)
        is_own = found.folder is None or root.resolve() in found.folder.resolve().parents
        if found != self and is_own:
            raise CheckpointError(
                f"another run has saved to {root} while this one began: it would go on after "
                f"step {found.step} now, and not after step {self.step}; start it again"
            )


def find_start(config: TrainingConfig) -> Start:
    """Looks at resume_checkpoint_path, and whether checkpoints_path is free for a new run.

    A run that is to resume from its own checkpoints_path, where there is no checkpoint yet, is new:
    so the same command starts a run and goes on with it.

    Raises CheckpointError, ConfigError, OSError.
    """
    section = config.checkpoints
    root = Path(section.checkpoints_path)
    if root.exists() and not root.is_dir():
        where = config.place.at("checkpoints.checkpoints_path")
        raise ConfigError(f"{where} is {root}, which is no folder")
    given = section.resume_checkpoint_path
    if given is None:
        _check_free(config, root)
        return Start()
    path, where = Path(given), config.place.at("checkpoints.resume_checkpoint_path")
    is_own = root.resolve() in (path.resolve(), path.resolve().parent)
    found = _checkpoint_in(path)
    if found is None and is_own:
        return Start()
    if found is None:
        raise CheckpointError(
            f"{where} is {path}, where there is neither {LATEST} nor a checkpoint of Nanotron's"
            + ("" if path.exists() else ": there is no such folder")
        )
    if not is_own:
        _check_free(config, root)
    folder = resolve(found)
    if not (folder / MODEL_CONFIG).is_file():
        raise CheckpointError(
            f"{folder / MODEL_CONFIG}: it is missing, so the checkpoint is not whole"
        )
    step, consumed = _read_metadata(folder / METADATA)
    _check_not_behind(config, step)
    return Start(folder, step, consumed)


def _checkpoint_in(path: Path) -> Path | None:
    """A checkpoint, or a run's folder that says which is its latest.

    Where latest.txt is missing (a run was killed just before it wrote it, or somebody removed it)
    it is the newest that is whole. None where there is none.
    """
    if (path / LATEST).is_file() or (path.is_dir() and is_nanotron_checkpoint(path)):
        return path
    steps = _steps_in(path)
    return path / str(max(steps)) if steps else None


def _steps_in(root: Path) -> list[int]:
    """The steps of the whole checkpoints in a run's folder."""
    return [
        int(each.name)
        for each in (root.iterdir() if root.is_dir() else ())
        if each.name.isdecimal() and (each / METADATA).is_file()
    ]


def _check_free(config: TrainingConfig, root: Path) -> None:
    """A new run must not write over another one."""
    if (root / LATEST).is_file() or _steps_in(root):
        where = config.place.at("checkpoints.checkpoints_path")
        raise ConfigError(
            f"{where} is {root}, which has the checkpoints of a run already: "
            f"go on with it by --checkpoints.resume_checkpoint_path={root}, or give another folder"
        )


def _check_not_behind(config: TrainingConfig, step: int) -> None:
    last = config.tokens.train_steps
    if step > last:
        raise ConfigError(
            f"{config.place.at('tokens.train_steps')} is {last}, and the checkpoint was saved "
            f"after step {step}: there is nothing left to train"
        )


def _read_metadata(path: Path) -> tuple[int, Consumed]:
    """The last step, and the samples of each data stage. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: it is missing, so the checkpoint is not whole")
    metas: Any = read_json_object(path).get("metas")
    try:
        step = _count(metas["last_train_step"])
        # Nanotron 0.4 wrote no data stages at first.
        stages = metas.get("data_stages") or [{**metas, "start_training_step": 1}]
        stages = sorted(stages, key=lambda stage: _count(stage["start_training_step"]))
        samples = tuple(_count(stage["consumed_train_samples"]) for stage in stages)
    except (KeyError, TypeError, AttributeError, ValueError):
        found = repr(metas)
        raise CheckpointError(
            f"{path}: metas should have last_train_step, and consumed_train_samples of each data "
            f"stage, each a count: it is {found if len(found) <= 200 else f'{found[:200]} ...'}"
        ) from None
    return step, Consumed(step, samples)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
