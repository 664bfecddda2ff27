"""Planning the states of training at another topology: files of the optimizer and the rates.

A file is laid out as Nanotron would write it: its names and numbers in the order of the target
rank's modules, whole shards or runs of them. The tensors in it are filled by moves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.plan.shards import ShardPlanner, Share
from nanotron_fast.checkpoints.states import StoredShard, TrainingStates, slices_of
from nanotron_fast.checkpoints.stored import some
from nanotron_fast.errors import CheckpointError
from nanotron_fast.families.parts import Param
from nanotron_fast.families.roles import is_row_bias
from nanotron_fast.formats.nanotron.checkpoint import OPTIMIZER
from nanotron_fast.formats.nanotron.optimizer import (
    MASTERS,
    PLAIN,
    RANDOM,
    ZERO,
    Described,
    Place,
    Run,
    Sizes,
    config_document,
    lr_scheduler_path,
    optimizer_path,
    random_path,
)
from nanotron_fast.formats.torch_file import Layout, NewTensor, StoredTensor, lay_out
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.plan import OutputFile

# Where the blocks stand that are no decoder layer: before the layers, or behind them.
_OTHERS = {"embedding": (0, 0), "norm": (2, 0), "head": (2, 1)}


class StatesTarget:
    """The files of the states at a topology.

    Args:
        states: as they are stored.
        params: the parameters as they will be written.
        stored_params: the same as they are stored, with other rows of the vocabulary perhaps.
        sizes: of the groups to write for.
        stage_of: the stage of a block.
        has_tied_copy: the head's stage has the embedding's matrix as well.

    Raises CheckpointError where the states are not those of these parameters.
    """

    def __init__(
        self,
        states: TrainingStates,
        params: Sequence[Param],
        stored_params: Sequence[Param],
        sizes: Sizes,
        *,
        stage_of: Callable[[int | str], int],
        has_tied_copy: bool,
    ) -> None:
        self.states, self.sizes = states, sizes
        self._params = {param.name: param for param in params}
        self._was = {param.name: param for param in stored_params}
        self._stage_of, self._has_tied_copy = stage_of, has_tied_copy
        self._order = {name: index for index, name in enumerate(states.names())}
        self._planner = ShardPlanner()
        # What the files of many ranks have alike.
        self._names: dict[tuple[int, bool, bool], list[str]] = {}
        self._shards: dict[tuple[str, str], list[StoredShard]] = {}
        self._dtypes: dict[tuple[str, str], Dtype] = {}
        self._values: dict[str, dict[str, Any]] = {}
        self._groups: dict[str, dict[str, Any]] = {}
        self._local: dict[str, tuple[tuple[int, ...], list[Run]]] = {}
        self._check_groups()
        self._check_names()
        self._rates = states.rates()

    def _check_groups(self) -> None:
        for stage in range(self.states.sizes.pp):
            source = self.states.first_of(stage)
            if source.group_size > 1:
                raise CheckpointError(
                    f"{source.path}: a group of constants is of {source.group_size} parameters; "
                    "Nanotron main writes one for each. The released 0.4 writes one for all, and "
                    "its states are not resharded: nanotron-fast convert takes the weights"
                )

    def _check_names(self) -> None:
        found = self.states.names()
        unknown = [name for name in found if name not in self._params]
        if unknown:
            raise CheckpointError(
                f"{self.states.folder / OPTIMIZER}: there are states of {len(unknown)} parameters "
                f"that the model has not: {some(unknown)}"
            )
        missing = [
            name
            for name, param in self._params.items()
            if name not in found and not param.is_frozen
        ]
        if missing:
            raise CheckpointError(
                f"{self.states.folder / OPTIMIZER}: there are no states of {len(missing)} "
                f"parameters: {some(missing)}"
            )

    def names_of(self, place: Place) -> list[str]:
        """The parameters of a rank, in the order of its modules."""
        # Without ZeRO what is not split is in the file of the first expert rank alone.
        key = place.pp, place.tp == 0, place.dp is None and place.ep > 0
        if key not in self._names:
            self._names[key] = self._names_at(*key)
        return self._names[key]

    def _names_at(self, stage: int, is_first: bool, is_of_experts: bool) -> list[str]:
        mine = [
            param
            for param in self._params.values()
            if self._stage_of(param.block) == stage and not param.is_frozen
        ]
        mine.sort(key=lambda param: (_rank_of(param.block), self._order[param.name]))
        names = [param.name for param in mine]
        if self._has_tied_copy and stage == self._stage_of("head"):
            names += [name for name, param in self._params.items() if param.block == "embedding"]
        return [
            name
            for name in names
            if (is_first or not is_row_bias(name, self._params))
            and (self._is_split(name) or not is_of_experts)
        ]

    def plan(self, number: Callable[[Path], int], outputs: list[OutputFile]) -> Iterator[Move]:
        """Adds the files to `outputs`, and makes the moves that fill them.

        `number` gives the number of a file among the sources.
        """
        wanted: dict[tuple[str, str], list[tuple[Place, int, int]]] = {}
        for place in self.sizes.places():
            layout = lay_out(self._document(place))
            for key, offset in layout.offsets.items():
                wanted.setdefault(key, []).append((place, len(outputs), offset))  # type: ignore[arg-type]
            outputs.append(_output(optimizer_path(place, self.sizes), layout))
        for (name, key), places in wanted.items():
            yield from self._moves(name, key, places, number)
        if self._rates is not None:
            for place in self.sizes.rate_places():
                document = self._rates.document(self._names_of_rates(place))
                outputs.append(_output(lr_scheduler_path(place, self.sizes), lay_out(document)))

    def _names_of_rates(self, place: Place) -> list[str]:
        """The parameters of the file of a rank's optimizer, for a file of the learning rate."""
        return self.names_of(replace(place, dp=place.ep) if self.sizes.zero_stage else place)

    def _document(self, place: Place) -> dict[str, Any]:
        """What a rank's file holds, its tensors still to be filled."""
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        names: dict[int, str] = {}
        masters: dict[str, NewTensor] = {}
        for name in self.names_of(place):
            index, run = len(names), self._run(name, place)
            is_here = run is None or run[0] < run[1]
            groups.append({**self._constants(name), "params": [index] if is_here else []})
            if not is_here:
                continue
            shape = self._local_shape(name) if run is None else (run[1] - run[0],)
            names[index] = name
            state[index] = dict(self._scalars(name))
            for key in self.states.keys_of(name):
                tensor = NewTensor((name, key), self._dtype(name, key), shape)
                if key == MASTERS:
                    masters[name] = tensor
                else:
                    state[index][key] = tensor
        document = {"state": state, "param_groups": groups, "names": names}
        return document | ({MASTERS: masters} if self._has_masters() else {})

    def _has_masters(self) -> bool:
        return self.states.first_of(0).has_masters

    def _constants(self, name: str) -> Mapping[str, Any]:
        if name not in self._groups:
            self._groups[name] = self._read_constants(name)
        return self._groups[name]

    def _read_constants(self, name: str) -> dict[str, Any]:
        source = self.states.first_of(self.states.stage_of(name))
        if name not in source.groups:
            raise CheckpointError(f"{source.path}: there are no constants of {name} in it")
        if self._has_masters() and MASTERS not in source.tensors[name]:
            raise CheckpointError(f"{source.path}: there is no master of {name} in it")
        return {key: _kept(value) for key, value in source.groups[name].items()}

    def _scalars(self, name: str) -> dict[str, Any]:
        if name not in self._values:
            source = self.states.first_of(self.states.stage_of(name))
            self._values[name] = {key: _kept(value) for key, value in source.scalars[name].items()}
        return self._values[name]

    def _run(self, name: str, place: Place) -> Run | None:
        if place.dp is None:
            return None
        return self._shard(name)[1][place.dp]

    def _is_split(self, name: str) -> bool:
        """Whether experts of a parameter are split over ranks."""
        return "ep" in self._params[name].cuts_at(self.sizes.axes)

    def _local_shape(self, name: str) -> tuple[int, ...]:
        return self._shard(name)[0]

    def _shard(self, name: str) -> tuple[tuple[int, ...], list[Run]]:
        """The shape of a rank's shard, and the run in its own of each data-parallel rank."""
        if name not in self._local:
            shape = self._params[name].local_shape(self.sizes.axes)
            runs = self.sizes.runs(math.prod(shape), is_split=self._is_split(name))
            self._local[name] = shape, runs
        return self._local[name]

    def _stored(self, name: str, key: str) -> list[StoredShard]:
        if (name, key) not in self._shards:
            was = self._was[name]
            shape = was.local_shape(self.states.sizes.axes)
            self._shards[name, key] = list(self.states.shards_of(was, key, shape))
        return self._shards[name, key]

    def _dtype(self, name: str, key: str) -> Dtype:
        if (name, key) not in self._dtypes:
            self._dtypes[name, key] = self._stored_dtype(name, key)
        return self._dtypes[name, key]

    def _stored_dtype(self, name: str, key: str) -> Dtype:
        dtypes = {shard.dtype for shard in self._stored(name, key)}
        if len(dtypes) != 1:
            told = ", ".join(sorted(dtype.name for dtype in dtypes)) or "nothing"
            raise CheckpointError(f"{self.states.folder / OPTIMIZER}: {key} of {name} is {told}")
        return dtypes.pop()

    def _moves(
        self,
        name: str,
        key: str,
        places: Sequence[tuple[Place, int, int]],
        number: Callable[[Path], int],
    ) -> list[Move]:
        """Those that fill one state of a parameter in all files."""
        param, was = self._params[name], self._was[name]
        # Rows are counted in a tensor that has room for those of both sides.
        whole = max(param.shape, was.shape)
        shape = was.local_shape(self.states.sizes.axes)
        stored = [
            Share(
                name=f"{key} of {name} in {shard.tensor.path}",
                file=number(shard.tensor.path),
                offset_bytes=shard.tensor.offset_bytes,
                dtype=shard.dtype,
                shape=shape,
                pairs=slices_of(was, self.states.sizes.axes, shard.ranks, first_copies=True),
                whole_shape=whole,
                run=shard.run,
            )
            for shard in self._stored(name, key)
        ]
        wanted = [
            Share(
                name=f"{key} of {name} in {optimizer_path(place, self.sizes)}",
                file=file,
                offset_bytes=offset,
                dtype=stored[0].dtype,
                shape=self._local_shape(name),
                pairs=slices_of(param, self.sizes.axes, {"tp": place.tp, "ep": place.ep}),
                whole_shape=whole,
                run=self._run(name, place),
            )
            for place, file, offset in places
        ]
        return self._planner.plan(
            stored,
            wanted,
            place=str(self.states.folder / OPTIMIZER),
            stored_rows=was.shape[0] if was.shape != param.shape else None,
        )

    def config(self) -> bytes:
        """`optimizer_config.json`."""
        described: dict[str, Described] = {}
        for stage in range(self.sizes.pp):
            for name in self.names_of(Place(stage, 0, None)):
                shape, runs = self._shard(name)
                described.setdefault(name, Described(name, tuple(runs), shape))
        kind = self.states.kind
        if kind in (None, ZERO):
            kind = PLAIN if self._has_masters() else "NamedOptimizer"
        return json.dumps(config_document(list(described.values()), self.sizes, kind=kind)).encode()

    def random_files(self) -> dict[str, Path]:
        """The files of random states to copy, by their paths in the destination.

        A rank has those of the rank in its place; of one that was not there, those of another: the
        ranks of a tensor-parallel group have the same.
        """
        was, copies = self.states.sizes, {}
        if not (self.states.folder / RANDOM).is_dir():
            return {}
        for pp in range(self.sizes.pp):
            for dp in range(self.sizes.dp):
                for tp in range(self.sizes.tp):
                    name = random_path(pp % was.pp, dp % was.dp, tp % was.tp, was)
                    path = self.states.folder / name
                    if path.is_file():
                        copies[random_path(pp, dp, tp, self.sizes)] = path
        return copies


def _kept(value: Any) -> Any:
    """A value as it is written again: tensors are those of one element, whose bytes are read."""
    if not isinstance(value, StoredTensor):
        return value
    if value.dtype not in Dtype.__members__ or value.shape:
        raise CheckpointError(
            f"{value.path}: among the constants is a tensor of {value.dtype} {list(value.shape)}"
        )
    return NewTensor(object(), Dtype[value.dtype], (), value.read())


def _rank_of(block: int | str) -> tuple[int, int]:
    """Sorts blocks by their order in the model."""
    return (1, block) if isinstance(block, int) else _OTHERS[block]


def _output(path: str, layout: Layout) -> OutputFile:
    (_, header), *literals = layout.literals
    return OutputFile(path, header, layout.size_bytes, tuple(literals), checksums=layout.checksums)
