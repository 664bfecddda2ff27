"""What is held out of data for validation: a share of them, whatever the batches of a run are.

Neither data-parallel ranks nor the size of a batch or of a validation may count. Otherwise a run
that goes on with other ones would train on what it validated on, and the reverse.
"""

from __future__ import annotations

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.samples import Part, Samples

_MANY = 4096


def num_held_out(size: int) -> int:
    """Of so many samples, those kept for validation.

    A tenth, rounded up, but no more than 4,096; and a hundredth where that is more.
    """
    return max(min(-(-size // 10), _MANY), size // 100)


def divided(samples: Samples, name: str) -> tuple[Part, Part]:
    """Samples for training, and the last ones for validation. Raises DataError."""
    size = len(samples)
    if size < 2:
        raise DataError(
            f"{name}: it has {size} sample, and a validation needs one that is not trained on: "
            "give more data, or set tokens.val_check_interval to -1"
        )
    stop = size - num_held_out(size)
    return Part(samples, 0, stop), Part(samples, stop, size)
