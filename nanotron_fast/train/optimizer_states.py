"""Filling an optimizer with the states of a checkpoint, whatever topology wrote them.

Each value is looked for where the files say that it is: a rank's run of a flattened shard, a shard
of the whole tensor. At the topology that wrote them that is one file and one copy. Files are mapped
into memory, so that only what is wanted of them is read.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.checkpoints.states import TrainingStates, slices_of
from nanotron_fast.errors import CheckpointError
from nanotron_fast.families.parts import Param
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron.checkpoint import MODEL_CONFIG
from nanotron_fast.formats.nanotron.optimizer import MASTERS, Run, Sizes
from nanotron_fast.formats.nanotron.slices import Region
from nanotron_fast.formats.plain_file import open_plain
from nanotron_fast.formats.torch_file import DTYPES, StoredTensor
from nanotron_fast.moves.files import FileState
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer import AdamW

_TORCH = {theirs: getattr(torch, ours) for ours, theirs in DTYPES.items() if hasattr(torch, ours)}


class StoredStates:
    """The states in a checkpoint, as tensors.

    Args:
        folder: of the checkpoint.

    Raises CheckpointError where files are missing, or some of another topology lie beside them.
    """

    def __init__(self, folder: Path) -> None:
        self._states = TrainingStates.read(folder)
        self._mapped: dict[Path, mmap.mmap] = {}
        # Rows of the vocabulary, padded to what that topology needed.
        self._vocab_size = read_json_object(folder / MODEL_CONFIG).get("vocab_size")

    @property
    def sizes(self) -> Sizes:
        """The groups of ranks that wrote the states."""
        return self._states.sizes

    def num_steps(self) -> int:
        """Steps that were taken. Raises CheckpointError where parameters took different numbers."""
        first = self._states.first_of(0)
        counts = set()
        for name, scalars in first.scalars.items():
            step: Any = scalars.get("step")
            if isinstance(step, StoredTensor):
                step = self._value(step).item()
            if not isinstance(step, (int, float)) or not math.isfinite(step):
                told = "no number" if step is None else f"{str(step)[:80]}"
                raise CheckpointError(f"{first.path}: step of {name} is {told}")
            counts.add(int(step))
        if len(counts) != 1:
            raise CheckpointError(
                f"{first.path}: its parameters took {sorted(counts)} steps, and should "
                "have taken as many each"
            )
        return counts.pop()

    def share(
        self,
        name: str,
        key: str,
        param: Param,
        *,
        tp: int,
        tp_rank: int,
        run: Run,
        ep: int = 1,
        ep_rank: int = 0,
    ) -> Tensor | None:
        """A run of a rank's shard of a state, flat.

        Args:
            name: by which files know the parameter.
            key: one of the moments, or MASTERS.
            param: its shape and how it is cut.
            tp, tp_rank, ep, ep_rank: of the shard that is wanted.
            run: the elements of the flattened shard.

        Returns None for masters where the checkpoint has none. Raises CheckpointError where the
        parameter is missing, or has another shape.
        """
        if not self._has(name, key):
            return None
        axes, ranks = {"tp": tp, "ep": ep}, {"tp": tp_rank, "ep": ep_rank}
        stored = replace(param, name=name, shape=(self._num_rows(param), *param.shape[1:]))
        was, axes_now = self.sizes.axes, param.cuts_at(axes)
        shape = param.local_shape(was) if stored.shape == param.shape else _rows_over(stored, was)
        if (
            stored.shape == param.shape
            and param.cuts_at(was) == axes_now
            and all(was[axis] == axes[axis] for axis in axes_now)
        ):
            return self._run(name, key, shape, {axis: ranks[axis] for axis in axes_now}, run)
        # Rows that pad the vocabulary were never learned.
        wanted = torch.zeros(param.local_shape(axes), dtype=torch.float32)
        regions = _regions(param, axes, ranks, tuple(wanted.shape))
        for theirs in stored.shards(was):
            found: Tensor | None = None
            # Of key-value heads that several ranks have copies of, those of the first.
            for source in _regions(stored, was, theirs, shape, first_copies=True):
                for target in regions:
                    common = _common(source, target)
                    if common is not None:
                        if found is None:
                            whole = (0, math.prod(shape))
                            found = self._run(name, key, shape, theirs, whole).view(shape)
                        wanted[common[1]] = found[common[0]]
        return wanted.view(-1)[run[0] : run[1]]

    def _has(self, name: str, key: str) -> bool:
        """Whether there is such a state; masters alone may be missing. Raises CheckpointError."""
        keys = self._states.keys_of(name)
        if key in keys:
            return True
        if key == MASTERS:
            return False
        has = ", ".join(sorted(set(keys) - {MASTERS})) or "nothing"
        path = self._states.first_of(self._states.stage_of(name)).path
        raise CheckpointError(
            f"{path}: {name} has no {key}, it has {has}: go on with the optimizer that wrote it, "
            "or with checkpoints.load_optimizer false"
        )

    def _num_rows(self, param: Param) -> int:
        """Of the whole parameter as it was stored: a vocabulary is padded for its topology."""
        is_vocabulary = param.block in ("embedding", "head") and len(param.shape) == 2
        if is_vocabulary and isinstance(self._vocab_size, int):
            return self._vocab_size
        return param.shape[0]

    def _run(
        self, name: str, key: str, shape: tuple[int, ...], ranks: Mapping[str, int], run: Run
    ) -> Tensor:
        """A run of a shard that was stored, from as many data-parallel ranks as have some of it."""
        parts = []
        for shard in self._states.shard(name, key, shape, ranks, within=run):
            first, end = shard.run or (0, math.prod(shape))
            low, high = max(first, run[0]), min(end, run[1])
            parts.append(self._value(shard.tensor).view(-1)[low - first : high - first])
        if not parts:
            return torch.empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _value(self, stored: StoredTensor) -> Tensor:
        """A tensor of a file that lies there in one piece, over a mapping of the file."""
        dtype = _TORCH.get(stored.dtype)
        if dtype is None:
            raise CheckpointError(f"{stored.path}: a tensor is of {stored.dtype}")
        count = stored.num_elements
        if not count:
            return torch.empty(stored.shape, dtype=dtype)
        whole = self._file(stored.path)
        flat = torch.frombuffer(whole, dtype=dtype, count=count, offset=stored.offset_bytes)
        return flat.view(stored.shape)

    def _file(self, path: Path) -> mmap.mmap:
        """A mapping of a file, which is what it was when its document was read."""
        if path not in self._mapped:
            with open_plain(path) as file:
                if FileState.of(os.fstat(file.fileno())) != self._states.read_files[path].state:
                    raise CheckpointError(f"{path}: it was changed while it was read")
                # torch takes what can be written to; nothing is.
                self._mapped[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._mapped[path]


def _rows_over(param: Param, axes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a shard of a vocabulary whose rows are not those of `Param.parts`."""
    shape = list(param.shape)
    for axis, dim in param.cuts_at(axes).items():
        shape[dim] //= axes[axis]
    return tuple(shape)


def _regions(
    param: Param,
    axes: Mapping[str, int],
    ranks: Mapping[str, int],
    shape: tuple[int, ...],
    *,
    first_copies: bool = False,
) -> list[Region]:
    """The boxes of the whole parameter that a rank's shard of this shape holds."""
    pairs = slices_of(param, axes, ranks, first_copies=first_copies)
    return [pair.region(param.name, shape, param.shape) for pair in pairs]


def _common(one: Region, other: Region) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The slices of two shards that are the same elements of the whole; None without any."""
    slices: tuple[list[slice], list[slice]] = ([], [])
    for dim in range(len(one.sizes)):
        low = max(one.whole[dim], other.whole[dim])
        high = min(each.whole[dim] + each.sizes[dim] for each in (one, other))
        if low >= high:
            return None
        for each, found in zip((one, other), slices, strict=True):
            shift = each.local[dim] - each.whole[dim]
            found.append(slice(low + shift, high + shift))
    return tuple(slices[0]), tuple(slices[1])


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
        for key, own in (*state.moments.items(), (MASTERS, state.master)):
            trained = state.trained
            if not own.numel():
                continue
            values = stored.share(
                trained.name,
                key,
                trained.facts.param,
                tp=mesh.tp,
                tp_rank=mesh.tp_rank,
                ep=mesh.ep,
                ep_rank=mesh.ep_rank,
                run=trained.run,
            )
            if values is not None:
                own.copy_(values)
    optimizer.num_steps = stored.num_steps()
