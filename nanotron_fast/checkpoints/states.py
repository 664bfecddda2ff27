"""The states of training in a checkpoint: what lies where, from the documents of its files alone.

States of the optimizer are parameters under another name and dtype: a master and the moments of
each, whole shards or runs of them. What is one number for a parameter (its steps, the constants of
its group, its learning rate) is kept as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.families.parts import Param
from nanotron_fast.formats.nanotron.optimizer import (
    MASTERS,
    OPTIMIZER,
    OPTIMIZER_CONFIG,
    Found,
    Place,
    Run,
    Sizes,
    find_states,
    runs_of,
)
from nanotron_fast.formats.torch_file import StoredTensor, read_torch_file
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.files import ReadFile

# Of a tensor that can be.
_MAX_DIMS, _MAX_SIZE = 64, 2**63 - 1
_KEYS = {"state", "param_groups", "names", MASTERS}


@dataclass(frozen=True, slots=True)
class RankStates:
    """One file of the optimizer.

    Attributes:
        names: of the parameters that it has states of, in their order.
        tensors: of each of them by its key; the masters' is MASTERS.
        scalars: of each of them, what is one value: tensors of no dimension, or plain values.
        groups: the constants of each of them.
        has_masters: whether it was written with fp32 masters.
    """

    path: Path
    names: tuple[str, ...]
    tensors: Mapping[str, Mapping[str, StoredTensor]]
    scalars: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, Any]]
    has_masters: bool


@dataclass(frozen=True, slots=True)
class StoredShard:
    """What one file has of a state: a run of a rank's flattened shard, or all of it."""

    tp_rank: int
    tensor: StoredTensor
    dtype: Dtype
    run: Run | None


@dataclass(slots=True)
class TrainingStates:
    """The states in a checkpoint, whatever topology wrote them.

    Attributes:
        folder: of the checkpoint.
        found: its files.
        read_files: what those that were read were then.
    """

    folder: Path
    found: Found
    read_files: dict[Path, ReadFile] = field(default_factory=dict)
    _ranks: dict[Place, RankStates] = field(default_factory=dict)
    _stages: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> TrainingStates:
        """Finds the files; each is read when it is asked for.

        Raises CheckpointError where files are missing, or contradict each other; OSError.
        """
        states = cls(folder, find_states(folder))
        if states.sizes.zero_stage:
            states._check_runs(states.found.config, folder / OPTIMIZER / OPTIMIZER_CONFIG)
        return states

    @property
    def sizes(self) -> Sizes:
        """The groups of ranks that wrote the states."""
        return self.found.sizes

    @property
    def kind(self) -> str | None:
        """The class of the optimizer."""
        kind = self.found.config.get("type")
        return kind if isinstance(kind, str) else None

    def _check_runs(self, document: Mapping[str, Any], path: Path) -> None:
        """Holds the runs of each parameter that the configuration names to Nanotron's rule."""
        configs = document.get("configs")
        configs = configs if isinstance(configs, Mapping) else {}
        offsets: Any = configs.get("param_name_to_dp_rank_offsets", {})
        shapes: Any = configs.get("orig_param_shapes", {})
        if not isinstance(offsets, Mapping):
            raise CheckpointError(f"{path}: param_name_to_dp_rank_offsets is not an object")
        for name, by_rank in offsets.items():
            try:
                shape = [int(size) for size in shapes[name]]
                if (
                    len(shape) > _MAX_DIMS
                    or not 0 <= min(shape, default=0) <= max(shape, default=0) <= _MAX_SIZE
                ):
                    raise ValueError
                found = {int(rank): (int(a), int(b)) for rank, (a, b) in by_rank.items()}
            except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
                raise CheckpointError(
                    f"{path}: the runs of {name[:200]} are not laid out as Nanotron's: "
                    f"{type(error).__name__}"
                ) from None
            runs = runs_of(math.prod(shape), self.sizes.dp)
            wanted = {rank: run for rank, run in enumerate(runs) if run[0] < run[1]}
            if found != wanted:
                runs_found = f"{list(found.values())[:4]}"[:200]
                raise CheckpointError(
                    f"{path}: the data-parallel ranks have the runs {runs_found} of "
                    f"{name[:200]}, and Nanotron's of {math.prod(shape)} elements over "
                    f"dp={self.sizes.dp} are {list(wanted.values())[:4]}"
                )

    def rank(self, place: Place) -> RankStates:
        """What a file holds. Raises CheckpointError, OSError."""
        if place not in self._ranks:
            self._ranks[place] = _rank_states(self.found.files[place], self.read_files)
        return self._ranks[place]

    def first_of(self, stage: int) -> RankStates:
        """The file of a stage's first rank, which has something of every parameter."""
        return self.rank(Place(stage, 0, 0 if self.sizes.zero_stage else None))

    def names(self) -> list[str]:
        """Of all parameters, each once, stage by stage, in the order of the files."""
        return list(self._by_name())

    def stage_of(self, name: str) -> int:
        """The stage in whose files a parameter is. Raises CheckpointError where it is in none."""
        stages = self._by_name()
        if name not in stages:
            raise CheckpointError(f"{self.folder / OPTIMIZER}: there are no states of {name} in it")
        return stages[name]

    def _by_name(self) -> dict[str, int]:
        if not self._stages:
            for stage in range(self.sizes.pp):
                for name in self.first_of(stage).names:
                    self._stages.setdefault(name, stage)
        return self._stages

    def keys_of(self, name: str) -> list[str]:
        """The states of a parameter that are tensors, in the order of its file."""
        return list(self.first_of(self.stage_of(name)).tensors.get(name, ()))

    def shards_of(self, param: Param, key: str, shape: Sequence[int]) -> Iterator[StoredShard]:
        """All that the files have of a state; of copies, that of the first tensor-parallel rank.

        Args:
            param: the parameter, of which files may have other rows.
            key: one of `keys_of`.
            shape: of a rank's shard of it as it was stored.

        Raises CheckpointError where it is missing or of another shape.
        """
        stage = self.stage_of(param.name)
        for tp_rank in range(self.sizes.tp if "tp" in param.cuts else 1):
            if not self.sizes.zero_stage:
                yield self._shard(Place(stage, tp_rank, None), param.name, key, shape, None)
                continue
            for dp_rank, run in enumerate(runs_of(math.prod(shape), self.sizes.dp)):
                if run[0] < run[1]:
                    place = Place(stage, tp_rank, dp_rank)
                    yield self._shard(place, param.name, key, shape, run)

    def _shard(
        self, place: Place, name: str, key: str, shape: Sequence[int], run: Run | None
    ) -> StoredShard:
        states = self.rank(place)
        if name not in states.tensors:
            raise CheckpointError(f"{states.path}: there is nothing of {name} in it")
        if key not in states.tensors[name]:
            raise CheckpointError(f"{states.path}: {name} has no {key}")
        tensor = states.tensors[name][key]
        wanted = tuple(shape) if run is None else (run[1] - run[0],)
        if tensor.shape != wanted:
            raise CheckpointError(
                f"{states.path}: {key} of {name} has shape {list(tensor.shape)}, and the model "
                f"calls for {list(wanted)}"
            )
        if tensor.dtype not in Dtype.__members__:
            raise CheckpointError(f"{states.path}: {key} of {name} is {tensor.dtype}")
        if not tensor.is_contiguous:
            raise CheckpointError(f"{states.path}: {key} of {name} is not stored in one piece")
        return StoredShard(place.tp, tensor, Dtype[tensor.dtype], run)

    def rates(self) -> LearningRates | None:
        """What the files of the learning rate hold; None where there are none.

        Raises CheckpointError where they contradict each other, or the optimizer's.
        """
        files = self.found.rates
        if not files:
            return None
        found: LearningRates | None = None
        for stage in range(self.sizes.pp):
            path = next(
                path for place, path in sorted(files.items()) if (place.pp, place.tp) == (stage, 0)
            )
            document = _mapping(read_torch_file(path), path)
            names = self.first_of(stage).names
            for key, value in document.items():
                if isinstance(value, list) and len(value) != len(names):
                    raise CheckpointError(
                        f"{path}: {key} has {len(value)} values, and the optimizer has "
                        f"{len(names)} parameters"
                    )
            of_all = {key: v for key, v in document.items() if not isinstance(v, list)}
            rates = LearningRates(path, tuple(document), of_all, {})
            found = found or rates
            if (found.keys, found.of_all) != (rates.keys, rates.of_all):
                raise CheckpointError(f"{path}: it is of another moment than {found.path}")
            for index, name in enumerate(names):
                each = {key: v[index] for key, v in document.items() if isinstance(v, list)}
                found.of_params.setdefault(name, each)
        return found


@dataclass(frozen=True, slots=True)
class LearningRates:
    """The files of the learning rate.

    Attributes:
        path: of the first of them.
        keys: of a file, in their order.
        of_all: what is said once.
        of_params: what is said of each parameter, by its name.
    """

    path: Path
    keys: tuple[str, ...]
    of_all: Mapping[str, Any]
    of_params: dict[str, dict[str, Any]]

    def document(self, names: Iterable[str]) -> dict[str, Any]:
        """A file for these parameters."""
        names = list(names)
        return {
            key: self.of_all[key]
            if key in self.of_all
            else [self.of_params[name][key] for name in names]
            for key in self.keys
        }


def _mapping(document: Any, path: Path) -> dict[Any, Any]:
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: it holds a {type(document).__name__}, not a dictionary")
    return document


def _rank_states(path: Path, read: dict[Path, ReadFile]) -> RankStates:
    """Reads a file of the optimizer, and refuses what is not laid out as Nanotron's."""
    document = _mapping(read_torch_file(path, read=read), path)
    missing = {"state", "names"} - set(document)
    if missing:
        raise CheckpointError(f"{path}: it lacks {', '.join(sorted(missing))}")
    unknown = [str(key)[:80] for key in document if key not in _KEYS]
    if unknown:
        raise CheckpointError(f"{path}: it holds {', '.join(unknown[:5])}, which is not known here")
    try:
        return _laid_out(path, document)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: it is not laid out as an optimizer's file of Nanotron's: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from None


def _laid_out(path: Path, document: Mapping[str, Any]) -> RankStates:
    names = {index: name for index, name in document["names"].items() if isinstance(name, str)}
    if len(names) != len(document["names"]) or set(names) != set(document["state"]):
        raise CheckpointError(f"{path}: its names are not those of the states that it has")
    if len(set(names.values())) != len(names):
        raise CheckpointError(f"{path}: it names a parameter twice")
    masters = document.get(MASTERS)
    if masters is not None and not isinstance(masters, dict):
        raise CheckpointError(f"{path}: {MASTERS} is a {type(masters).__name__}")
    for name, master in (masters or {}).items():
        if not isinstance(master, StoredTensor):
            raise CheckpointError(
                f"{path}: {MASTERS} holds a {type(master).__name__} for {str(name)[:200]}, not a "
                "tensor"
            )
    groups: dict[Any, Mapping[str, Any]] = {}
    for group in document.get("param_groups", ()):
        if len(group["params"]) > 1:
            raise CheckpointError(
                f"{path}: a group of constants is of {len(group['params'])} parameters; Nanotron "
                "main writes one for each. The released 0.4 writes one for all, and its states are "
                "not resharded: nanotron-fast convert takes the weights"
            )
        for index in group["params"]:
            groups[index] = {key: value for key, value in group.items() if key != "params"}
    tensors: dict[str, dict[str, StoredTensor]] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index in sorted(names):
        name = names[index]
        tensors[name], scalars[name] = {}, {}
        for key, value in document["state"][index].items():
            is_one = not isinstance(value, StoredTensor) or not value.shape
            (scalars if is_one else tensors)[name][key] = value
        if masters and name in masters:
            tensors[name][MASTERS] = masters[name]
    return RankStates(
        path,
        tuple(tensors),
        tensors,
        scalars,
        {names[index]: group for index, group in groups.items() if index in names},
        masters is not None,
    )
