"""What is measured at each step, and the file that keeps it: metrics.jsonl.

A line is one JSON object, written whole in one call, in the order of the steps. A run that resumes
goes on after the line of its checkpoint's step: what an abandoned run wrote after that is cut off.
"""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from nanotron_fast.errors import CheckpointError

FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One step of a run.

    Args:
        step: counted from 1.
        loss: the mean over the whole global batch, before the update.
        learning_rate: that the step used.
        grad_norm: over all parameters, before clipping.
        tokens: trained on so far, over all ranks, this step included.
        tokens_per_second: of this step, over all ranks.
        mfu: the FLOPs of the step over what the devices can do in its time; None where that is not
            known, as on a CPU.
        memory_bytes: the peak of any rank: what torch allocated on a GPU, else the process.
        seconds: the step took, with the wait for its batch; not a validation, not a save.
        validation_loss: where there was a validation after the step.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    mfu: float | None
    memory_bytes: int
    seconds: float
    validation_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields, validation_loss only where there is one; null for what is no number."""
        document = asdict(self)
        if self.validation_loss is None:
            del document["validation_loss"]
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in document.items()
        }


class MetricsFile:
    """The file of a run, on the one rank that writes it."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Opens it for the steps after `after_step` (0: from the start), and cuts off others.

        Raises OSError, which names the file, and CheckpointError where it holds something else.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        end = _end_of(path, after_step) if path.exists() else 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(self._descriptor, end)
            os.lseek(self._descriptor, end, os.SEEK_SET)
        except BaseException:
            self.close()
            raise

    def write(self, metrics: StepMetrics) -> None:
        """Adds a line. Raises OSError, which names the file; then none of the line stays."""
        line = (json.dumps(metrics.to_json(), allow_nan=False) + "\n").encode()
        start = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        try:
            if os.write(self._descriptor, line) < len(line):
                # A disk that fills up takes a part.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._descriptor, start)
            os.lseek(self._descriptor, start, os.SEEK_SET)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def close(self) -> None:
        """Closes the file. It may be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _end_of(path: Path, after_step: int) -> int:
    """Bytes of the lines up to and with a step. A last line that is not whole is none."""
    end = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n") or _parse(path, number, line)["step"] > after_step:
                break
            end += len(line)
    return end


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every line of a run's file. Raises CheckpointError, which names the line; OSError.

    A last line that a run is just writing is left out.
    """
    found = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                found.append(_parse(path, number, line))
    return found


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("step"), int):
        raise CheckpointError(f"{path}: line {number} is no step's metrics: {line[:60]!r}")
    return document
