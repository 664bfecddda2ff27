"""Whether all ranks of a run have the same configuration: each reads a file of its own machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nanotron_fast.train.config.place import shown
from nanotron_fast.train.config.training_config import TrainingConfig

# Places of a machine's own disks, and what it says; these may be others on each.
_OWN = ("checkpoints.resume_checkpoint_path", "model.init_method.path", "tokenizer", "logging")
_DERIVED = "optimizer.learning_rate_scheduler.lr_decay_"
_OWN_OF_STAGE = ".data.dataset"


def what_ranks_share(config: TrainingConfig) -> dict[str, Any]:
    """The values that must be the same on all ranks, by their dotted keys."""
    found = {**dict(_values(config.to_dict())), **dict(_values(config.ours()))}
    return {
        key: value
        for key, value in found.items()
        if not key.startswith(_OWN) and _OWN_OF_STAGE not in key
    }


def check_agreement(config: TrainingConfig, first: Mapping[str, Any]) -> None:
    """Refuses a configuration that is not the first rank's, as `what_ranks_share` gives that.

    Ranks would step apart in silence, or wait for one that takes fewer steps. Raises ConfigError.
    """
    mine = what_ranks_share(config)
    # What is taken from other values where it is left out comes last.
    for key in sorted({*mine, *first}, key=lambda key: (key.startswith(_DERIVED), key)):
        if mine.get(key) != first.get(key):
            raise config.place.at(key).error(
                f" is {shown(mine.get(key))} on one rank, and {shown(first.get(key))} on the "
                "first: all ranks train by one configuration"
            )


def _values(found: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items: Any = ()
    if isinstance(found, dict):
        items = found.items()
    elif isinstance(found, list | tuple):
        items = enumerate(found)
    else:
        yield key, found
    for name, value in items:
        yield from _values(value, f"{key}.{name}" if key else str(name))
