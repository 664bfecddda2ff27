"""Reading the optimizer's states of a checkpoint, whatever topology wrote them.

Each value is looked for where the files say that it is: a rank's run of a flattened shard, a shard
of the whole tensor. At the topology that wrote them that is one file and one copy. Files are mapped
into memory, so that only what is wanted of them is read.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.errors import CheckpointError
from nanotron_fast.families.parts import Param
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron.checkpoint import MODEL_CONFIG
from nanotron_fast.formats.nanotron.optimizer import MASTERS, Place, Run, find_states, runs_of
from nanotron_fast.formats.nanotron.slices import shard_pairs
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer import AdamW, State


class StoredStates:
    """The files of a checkpoint's optimizer.

    Args:
        folder: of the checkpoint.

    Raises CheckpointError where files are missing, or some of another topology lie beside them.
    """

    def __init__(self, folder: Path) -> None:
        found = find_states(folder)
        self._files, self.sizes = found.files, found.sizes
        self._open: dict[Place, dict[str, Any]] = {}
        self._by_name: dict[Place, dict[str, dict[str, Tensor]]] = {}
        self._is_zero = self.sizes.zero_stage > 0
        # Rows of the vocabulary, padded to what that topology needed.
        self._vocab_size = read_json_object(folder / MODEL_CONFIG).get("vocab_size")

    def num_steps(self) -> int:
        """Steps that were taken. Raises CheckpointError where parameters took different numbers."""
        place = next(iter(self._files))
        with _laid_out(self._files[place]):
            counts = {int(state["step"]) for state in self._document(place)["state"].values()}
        if len(counts) != 1:
            raise CheckpointError(
                f"{self._files[place]}: its parameters took {sorted(counts)} steps, and should "
                "have taken as many each"
            )
        return counts.pop()

    def share(
        self, name: str, key: str, param: Param, *, tp: int, tp_rank: int, run: Run
    ) -> Tensor | None:
        """A run of a rank's shard of a state, flat.

        Args:
            name: by which files know the parameter.
            key: one of the moments, or MASTERS.
            param: its shape and how it is cut.
            tp, tp_rank: of the shard that is wanted.
            run: the elements of the flattened shard.

        Returns None for masters where the checkpoint has none. Raises CheckpointError where the
        parameter is missing, or has another shape.
        """
        stage, was_tp = self._stage_of(name), self.sizes.tp
        num_rows = self._num_rows(param)
        if "tp" not in param.cuts or (was_tp == tp and num_rows == param.shape[0]):
            same = param.local_shape({"tp": tp})
            return self._stored(name, key, same, stage, tp_rank if "tp" in param.cuts else 0, run)
        whole: Tensor | None = None
        shape = list(param.shape)
        shape[0] = num_rows
        shape[param.cuts["tp"]] //= was_tp
        for rank in range(was_tp):
            stored = self._stored(name, key, shape, stage, rank, (0, math.prod(shape)))
            if stored is None:
                return None
            stored = stored.view(*shape)
            if whole is None:
                whole = torch.empty(num_rows, *param.shape[1:], dtype=torch.float32)
            for pair in _pairs(param, was_tp, rank, tuple(whole.shape)):
                whole[pair.whole] = stored[pair.local]
        assert whole is not None
        if num_rows < param.shape[0]:
            # Rows that pad the vocabulary were never learned.
            more = whole.new_zeros(param.shape[0] - num_rows, *param.shape[1:])
            whole = torch.cat([whole, more])
        whole = whole[: param.shape[0]]
        wanted = torch.empty(param.local_shape({"tp": tp}), dtype=torch.float32)
        for pair in _pairs(param, tp, tp_rank, param.shape):
            wanted[pair.local] = whole[pair.whole]
        return wanted.view(-1)[run[0] : run[1]]

    def _num_rows(self, param: Param) -> int:
        """Of the whole parameter as it was stored: a vocabulary is padded for its topology."""
        is_vocabulary = param.block in ("embedding", "head") and len(param.shape) == 2
        if is_vocabulary and isinstance(self._vocab_size, int):
            return self._vocab_size
        return param.shape[0]

    def _stored(
        self, name: str, key: str, shape: Sequence[int], stage: int, tp_rank: int, run: Run
    ) -> Tensor | None:
        """A run of a shard that was stored, from as many data-parallel ranks as have some of it."""
        if not self._is_zero:
            value = self._value(Place(stage, tp_rank, None), name, key, shape)
            return None if value is None else value.reshape(-1)[run[0] : run[1]]
        parts = []
        for rank, (first, end) in enumerate(runs_of(math.prod(shape), self.sizes.dp)):
            low, high = max(first, run[0]), min(end, run[1])
            if low < high:
                part = self._value(Place(stage, tp_rank, rank), name, key, (end - first,))
                if part is None:
                    return None
                parts.append(part[low - first : high - first])
        return torch.cat(parts)

    def _value(self, place: Place, name: str, key: str, shape: Sequence[int]) -> Tensor | None:
        states = self._states(place)
        path = self._files[place]
        if name not in states:
            raise CheckpointError(f"{path}: there is nothing of {name} in it")
        if key not in states[name]:
            if key == MASTERS:
                return None
            has = ", ".join(sorted(set(states[name]) - {"step", MASTERS})) or "nothing"
            raise CheckpointError(
                f"{path}: {name} has no {key}, it has {has}: go on with the optimizer that wrote "
                "it, or with checkpoints.load_optimizer false"
            )
        value = states[name][key]
        if tuple(value.shape) != tuple(shape):
            raise CheckpointError(
                f"{path}: {key} of {name} has shape {list(value.shape)}, and the model calls for "
                f"{list(shape)}"
            )
        return value

    def _stage_of(self, name: str) -> int:
        for place in self._files:
            if place.tp == 0 and not place.dp and name in self._states(place):
                return place.pp
        raise CheckpointError(
            f"{next(iter(self._files.values())).parent}: there are no states of {name} in it"
        )

    def _states(self, place: Place) -> dict[str, dict[str, Tensor]]:
        """The tensors of each parameter in a file, by its name."""
        if place not in self._by_name:
            document = self._document(place)
            found: dict[str, dict[str, Tensor]] = {}
            with _laid_out(self._files[place]):
                masters = document.get(MASTERS, {})
                for index, name in document["names"].items():
                    found[name] = dict(document["state"][index])
                    if name in masters:
                        found[name][MASTERS] = masters[name]
            self._by_name[place] = found
        return self._by_name[place]

    def _document(self, place: Place) -> dict[str, Any]:
        if place not in self._open:
            path = self._files[place]
            if not zipfile.is_zipfile(path):
                raise CheckpointError(
                    f"{path}: it is not, or not the whole of, what torch.save writes"
                )
            try:
                document = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
                raise CheckpointError(f"{path}: it cannot be read: {error}") from error
            missing = {"state", "names"} - set(document if isinstance(document, dict) else ())
            if missing:
                raise CheckpointError(f"{path}: it lacks {', '.join(sorted(missing))}")
            self._open[place] = document
        return self._open[place]


@contextmanager
def _laid_out(path: Path) -> Iterator[None]:
    """What is read within is where Nanotron has it. Raises CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: it is not laid out as an optimizer's file of Nanotron's: "
            f"{type(error).__name__}: {error}"
        ) from None


def _pairs(param: Param, tp: int, rank: int, shape: tuple[int, ...]) -> Any:
    return shard_pairs(shape, split=param.cuts.get("tp"), chunks=param.chunks, tp=tp, rank=rank)


@torch.no_grad()
def load_states(folder: Path, optimizer: AdamW, mesh: Mesh) -> None:
    """Fills a rank's moments, masters and count of steps from a checkpoint of any topology.

    Every value is taken as it is. Where the checkpoint has no masters, those that were made from
    the weights stay.

    Args:
        folder: of the checkpoint, whose weights the parameters have already.

    Raises CheckpointError, which names the file; nothing is changed then but what was read before.
    """
    stored = StoredStates(folder)
    for state in optimizer.states:
        for key, own in _targets(state):
            trained = state.trained
            if not own.numel():
                continue
            values = stored.share(
                trained.name,
                key,
                trained.facts.param,
                tp=mesh.tp,
                tp_rank=mesh.tp_rank,
                run=trained.run,
            )
            if values is not None:
                own.copy_(values)
    optimizer.num_steps = stored.num_steps()


def _targets(state: State) -> list[tuple[str, Tensor]]:
    return [*state.moments.items(), (MASTERS, state.master)]
