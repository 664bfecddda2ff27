"""Whether all ranks of a run have the same packages and configuration, each of its own machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from nanotron_fast.errors import MissingPackageError
from nanotron_fast.train.config.place import shown
from nanotron_fast.train.config.training_config import TrainingConfig
from nanotron_fast.version import __version__

# What computes, besides this package.
_PACKAGES = ("torch", "triton")
# Places of a machine's own disks, and what it says; these may be others on each.
_OWN = ("checkpoints.resume_checkpoint_path", "model.init_method.path", "tokenizer", "logging")
# So may those of a dataset, of which there are as many on each, and how it is made into tokens.
_PLACES = ("dataset_folder", "hf_dataset_or_datasets")
_OWN_OF_DATASET = (
    "dataset_read_path",
    "tokenizer_name",
    "dataset_processing_num_proc_per_process",
    "dataset_overwrite_cache",
)
_DERIVED = "optimizer.learning_rate_scheduler.lr_decay_"


def packages() -> dict[str, str | None]:
    """The version of each package that a rank computes with, None of one that is not there."""
    found: dict[str, str | None] = {"nanotron_fast": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def check_packages(first: Mapping[str, str | None]) -> None:
    """Refuses packages that are not the first rank's, as `packages` gives those.

    Ranks would round otherwise, and parameters that they have in common drift apart in silence.
    Raises MissingPackageError.
    """
    for name, mine in packages().items():
        if mine != first.get(name):
            raise MissingPackageError(
                f"{name} is {mine or 'missing'} on one rank, and {first.get(name) or 'missing'} "
                "on the first: install the same packages on all machines"
            )


def what_ranks_share(config: TrainingConfig) -> dict[str, Any]:
    """The values that must be the same on all ranks, by their dotted keys."""
    document = config.to_dict()
    for stage in document["data_stages"]:
        if stage["data"]["dataset"] is not None:
            stage["data"]["dataset"] = _shared_of(stage["data"]["dataset"])
    # By their names: the configuration has sorted them, and lost their indices.
    document["data_stages"] = {stage["name"]: stage for stage in document["data_stages"]}
    found = {**dict(_values(document)), **dict(_values(config.ours()))}
    return {key: value for key, value in found.items() if not key.startswith(_OWN)}


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


def _shared_of(dataset: Mapping[str, Any]) -> dict[str, Any]:
    shared = {key: value for key, value in dataset.items() if key not in _OWN_OF_DATASET}
    return {**shared, **{key: _without_names(shared[key]) for key in _PLACES if key in shared}}


def _without_names(places: Any) -> list[Any]:
    """What is the same of places wherever they lie: their weights, or that they are there."""
    if isinstance(places, Mapping):
        return list(places.values())
    return ["a path"] * (1 if isinstance(places, str) else len(places))


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
