"""What one file of an optimizer's states holds, from its document alone.

A document that is not laid out as Nanotron's is refused here, so that all who read states find them
by the names of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.nanotron.optimizer import MASTERS
from nanotron_fast.formats.torch_file import StoredTensor, read_torch_file
from nanotron_fast.moves.files import ReadFile

_KEYS = {"state", "param_groups", "names", MASTERS}
# Numbers of states that a message names.
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class RankStates:
    """One file of the optimizer.

    Attributes:
        names: of the parameters that it has states of, in their order.
        tensors: of each of them by its key; the masters' is MASTERS.
        scalars: of each of them, what is one value: tensors of no dimension, or plain values.
        groups: the constants of each of them.
        group_size: parameters of the largest group of constants; Nanotron main writes one for each
            parameter, the released 0.4 one for all.
        has_masters: whether it was written with fp32 masters.
    """

    path: Path
    names: tuple[str, ...]
    tensors: Mapping[str, Mapping[str, StoredTensor]]
    scalars: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, Any]]
    group_size: int
    has_masters: bool


def read_rank_states(path: Path, read: dict[Path, ReadFile]) -> RankStates:
    """Reads a file of the optimizer, and notes in `read` what the file was then.

    Raises CheckpointError, which names the file, where it is not laid out as Nanotron's; OSError.
    """
    document = mapping(read_torch_file(path, read=read), path)
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


def mapping(document: Any, path: Path) -> dict[Any, Any]:
    """A file's document, which should be a dictionary. Raises CheckpointError."""
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: it holds a {type(document).__name__}, not a dictionary")
    return document


def _laid_out(path: Path, document: Mapping[str, Any]) -> RankStates:
    names = {index: name for index, name in document["names"].items() if isinstance(name, str)}
    _check_names(path, document, names)
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
    group_size = 1
    for group in document.get("param_groups", ()):
        group_size = max(group_size, len(group["params"]))
        constants = {key: value for key, value in group.items() if key != "params"}
        for index in group["params"]:
            groups[index] = constants
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
        group_size,
        masters is not None,
    )


def _check_names(path: Path, document: Mapping[str, Any], names: Mapping[Any, str]) -> None:
    """Every state has a name, and every name a state and but one. Raises CheckpointError."""
    of_states = set(document["state"])
    if len(names) != len(document["names"]) or set(names) != of_states:
        told = [
            f"{what} {', '.join(sorted(str(each)[:20] for each in found)[:_SHOWN])}"
            for what, found in (
                ("there are no names of the states", of_states - set(names)),
                ("there are no states of the names", set(names) - of_states),
            )
            if found
        ]
        raise CheckpointError(
            f"{path}: its names are not those of the states that it has"
            + (f": {'; '.join(told)}" if told else "")
        )
    if len(set(names.values())) != len(names):
        raise CheckpointError(f"{path}: it names a parameter twice")
