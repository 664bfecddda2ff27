"""The states of training in a checkpoint: what lies where, from the documents of its files alone.

States of the optimizer are parameters under another name and dtype: a master and the moments of
each, whole shards or runs of them. What is one number for a parameter (its steps, the constants of
its group, its learning rate) is kept as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.rank_states import RankStates, mapping, read_rank_states
from nanotron_fast.errors import CheckpointError
from nanotron_fast.families.parts import Param
from nanotron_fast.formats.nanotron.checkpoint import OPTIMIZER
from nanotron_fast.formats.nanotron.optimizer import (
    OPTIMIZER_CONFIG,
    Found,
    Place,
    Run,
    Sizes,
    find_states,
)
from nanotron_fast.formats.nanotron.slices import SlicesPair, shard_pairs
from nanotron_fast.formats.torch_file import StoredTensor, read_torch_file
from nanotron_fast.model.spread import Heads
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.files import ReadFile

# Of a tensor that can be.
_MAX_DIMS, _MAX_SIZE = 64, 2**63 - 1


@dataclass(frozen=True, slots=True)
class StoredShard:
    """What one file has of a state: a run of a flattened shard, or all of it.

    `ranks` are those of the shard along the axes that cut the parameter, as of `Param.shards`.
    """

    ranks: Mapping[str, int]
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
            # Of experts or not: their name does not say.
            by_rule = [
                {rank: run for rank, run in enumerate(runs) if run[0] < run[1]}
                for runs in (
                    self.sizes.runs(math.prod(shape), is_split=is_split)
                    for is_split in (False, True)
                )
            ]
            if found not in by_rule:
                runs_found = f"{list(found.values())[:4]}"[:200]
                raise CheckpointError(
                    f"{path}: the data-parallel ranks have the runs {runs_found} of "
                    f"{name[:200]}, and Nanotron's of {math.prod(shape)} elements over "
                    f"dp={self.sizes.dp} are {list(by_rule[0].values())[:4]}"
                )

    def rank(self, place: Place) -> RankStates:
        """What a file holds. Raises CheckpointError, OSError."""
        if place not in self._ranks:
            self._ranks[place] = read_rank_states(self.found.files[place], self.read_files)
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
        for ranks in param.shards(self.sizes.axes):
            yield from self.shard(param.name, key, shape, ranks)

    def shard(
        self,
        name: str,
        key: str,
        shape: Sequence[int],
        ranks: Mapping[str, int],
        *,
        within: Run | None = None,
    ) -> Iterator[StoredShard]:
        """What the files have of one shard of a state, in the order of its elements.

        Args:
            name: of the parameter.
            key: one of `keys_of`.
            shape: of the shard as it was stored.
            ranks: of the shard along the axes that cut the parameter.
            within: elements of the flattened shard, where files that have none of them are not
                asked for.

        Raises CheckpointError where it is missing or of another shape.
        """
        stage, sizes = self.stage_of(name), self.sizes
        tp, ep, is_split = ranks.get("tp", 0), ranks.get("ep", 0), "ep" in ranks
        if not sizes.zero_stage:
            place = Place(stage, tp, None, ep)
            yield self._stored(place, name, key, tuple(shape), ranks, None)
            return
        first, end = within or (0, math.prod(shape))
        for dp, run in enumerate(sizes.runs(math.prod(shape), is_split=is_split)):
            has_it = not is_split or dp % sizes.ep == ep
            if has_it and max(run[0], first) < min(run[1], end):
                place = Place(stage, tp, dp, dp % sizes.ep)
                yield self._stored(place, name, key, (run[1] - run[0],), ranks, run)

    def _stored(
        self,
        place: Place,
        name: str,
        key: str,
        shape: tuple[int, ...],
        ranks: Mapping[str, int],
        run: Run | None,
    ) -> StoredShard:
        states = self.rank(place)
        if name not in states.tensors:
            raise CheckpointError(f"{states.path}: there is nothing of {name} in it")
        if key not in states.tensors[name]:
            raise CheckpointError(f"{states.path}: {name} has no {key}")
        tensor = states.tensors[name][key]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{states.path}: {key} of {name} has shape {list(tensor.shape)}, and the model "
                f"calls for {list(shape)}"
            )
        if tensor.dtype not in Dtype.__members__:
            raise CheckpointError(f"{states.path}: {key} of {name} is {tensor.dtype}")
        if not tensor.is_contiguous:
            raise CheckpointError(f"{states.path}: {key} of {name} is not stored in one piece")
        return StoredShard(ranks, tensor, Dtype[tensor.dtype], run)

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
            document = mapping(read_torch_file(path, read=self.read_files), path)
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


def slices_of(
    param: Param,
    axes: Mapping[str, int],
    ranks: Mapping[str, int],
    *,
    first_copies: bool = False,
) -> tuple[SlicesPair, ...]:
    """Which slices of a rank's shard are which of the whole parameter.

    Args:
        param: of which one axis at most cuts the shard.
        axes: sizes of the topology's axes.
        ranks: of the shard along them.
        first_copies: of key-value heads that several ranks have, the first of them has them alone.
    """
    axis, dim = next(iter(param.cuts_at(axes).items()), ("tp", None))
    size, rank = axes.get(axis, 1), ranks.get(axis, 0)
    return _slices(param.shape, dim, param.chunks, param.heads, size, rank, first_copies)


@cache
def _slices(
    shape: tuple[int, ...],
    dim: int | None,
    chunks: tuple[int, ...] | None,
    heads: tuple[Heads | None, ...],
    size: int,
    rank: int,
    first_copies: bool,
) -> tuple[SlicesPair, ...]:
    return shard_pairs(
        shape,
        split=dim,
        chunks=chunks,
        heads=heads,
        tp=size,
        rank=rank,
        first_copies=first_copies,
    )
