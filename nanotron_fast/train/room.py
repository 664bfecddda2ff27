"""Whether the checkpoints of a run can be written, which is asked before its first step."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from nanotron_fast.checkpoints.ownership import Lock
from nanotron_fast.errors import DestinationError
from nanotron_fast.train.architecture import ModelPlan
from nanotron_fast.train.checkpoint import prove_writable
from nanotron_fast.train.claim import claim, give_up
from nanotron_fast.train.config import TrainingConfig
from nanotron_fast.train.estimate import checkpoint_bytes
from nanotron_fast.train.start import Start


def claim_room(config: TrainingConfig, model: ModelPlan, start: Start) -> Lock | None:
    """Makes and claims the folder of a run, and proves that a checkpoint can be written to it.

    For one rank: they all see the same folder. Where a run is at its end already nothing is looked
    at, and the space is where steps are to be saved.

    Returns the claim, to be released when the run ends; None where nothing will be written. Raises
    ConfigError; CheckpointError where another run has saved since `start` was found; OSError.
    """
    root = Path(config.checkpoints.checkpoints_path)
    if start.folder is not None and start.step == config.tokens.train_steps:
        return None
    where = config.place.at("checkpoints.checkpoints_path")
    with ExitStack() as undone:
        try:
            lock = claim(root)
            undone.callback(give_up, lock)
            prove_writable(root)
        except DestinationError as error:
            raise where.error(
                f" is {root}, and {error}: wait for its end, or give another folder"
            ) from error
        except OSError as error:
            raise where.error(
                f" is {root}, where no checkpoint can be written: {error.strerror}: "
                f"{error.filename}"
            ) from error
        start.check_is_still(config)
        room, needed = shutil.disk_usage(root), checkpoint_bytes(config, model)
        # A mount of a store or of a network may know no size, and says 0.
        if room.total and room.free < needed and _saves(config, start):
            raise where.error(
                f" is {root}, where {room.free:,} bytes are free, and a checkpoint takes "
                f"{needed:,}: make room, or give another folder"
            )
        undone.pop_all()
    return lock


def _saves(config: TrainingConfig, start: Start) -> bool:
    """Whether a checkpoint will be written, even where no signal asks for one."""
    section, last = config.checkpoints, config.tokens.train_steps
    interval = section.checkpoint_interval
    return (
        section.save_final_state
        or (section.save_initial_state and start.folder is None)
        or last // interval > start.step // interval
    )
