"""Checkpoints of a run, written while the training goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nanotron_fast.checkpoints.ownership import Lock
from nanotron_fast.checkpoints.processes import Processes, TorchProcesses
from nanotron_fast.formats.nanotron.checkpoint import is_nanotron_checkpoint
from nanotron_fast.train.checkpoint import Beside, Snapshot, save
from nanotron_fast.train.claim import check
from nanotron_fast.train.mesh import Mesh


class Saver:
    """Writes one checkpoint at a time, on a thread of each rank.

    The threads of all ranks agree over a group of their own, so that they do not meet the
    collectives of the training.

    Args:
        root: the folder of the run, which all ranks see.
        mesh: of the run; every rank makes its saver.
        beside: from the first rank, what lies beside the weights.
        keep_last: checkpoints to keep; None for all.
        warn: is told what a Hugging Face folder lacks.
        lock: of the folder, on the first rank; no checkpoint becomes whole where it is lost.
    """

    def __init__(
        self,
        root: Path,
        mesh: Mesh,
        *,
        beside: Beside,
        keep_last: int | None,
        warn: Callable[[str], None],
        lock: Lock | None,
    ) -> None:
        self._root, self._beside, self._keep_last = root, beside, keep_last
        self._check = None if lock is None else partial(check, lock)
        self._warn = warn
        self._processes = Processes()
        if mesh.world is not None:
            self._processes = TorchProcesses(dist.new_group(backend="gloo"))
        self._thread: threading.Thread | None = None
        # What went wrong on this rank in a save that has ended.
        self.error: BaseException | None = None
        # The last checkpoint that is whole, and the one that is being written.
        self.last: Path | None = None
        self._step = -1

    def start(self, step: int, taken: Snapshot, metadata: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint; the one before has to be finished."""
        assert self._thread is None
        self._step = step
        self._thread = threading.Thread(
            target=self._save, args=(step, taken, metadata), name="checkpoint", daemon=True
        )
        self._thread.start()

    def has_begun(self, step: int) -> bool:
        """Whether the checkpoint of a step is written, or was."""
        return self._step == step

    def finished(self) -> BaseException | None:
        """Waits until nothing is being written. Returns what went wrong on this rank, or None."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.error

    def close(self) -> None:
        """Ends the connection of the threads, where nothing is being written on any rank."""
        self._processes.close()

    def _save(self, step: int, taken: Snapshot, metadata: Mapping[str, Any]) -> None:
        try:
            self.last = save(
                self._root,
                step,
                taken,
                self._processes,
                beside=self._beside,
                metadata=metadata,
                warn=self._warn,
                check=self._check,
            )
            with self._processes.step():
                if self._processes.rank == 0:
                    self._remove_old(step)
        except BaseException as error:  # for `finished`, on the thread that trains
            self.error = error

    def _remove_old(self, step: int) -> None:
        """All but the newest up to a step; never one of a later step, which is another run's."""
        if self._keep_last is None:
            return
        steps = sorted(
            int(path.name)
            for path in self._root.iterdir()
            if path.name.isdecimal() and is_nanotron_checkpoint(path)
        )
        for old in [each for each in steps if each <= step][: -self._keep_last]:
            # Not there under its name while it is half gone.
            leaving = self._root / f".{old}.removed.partial"
            (self._root / str(old)).rename(leaving)
            shutil.rmtree(leaving)
