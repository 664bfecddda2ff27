"""What a launch is tuned by: the rule of its operation, or what was measured on such a GPU.

Each launch that can be tuned has a class: its fields are what may be tuned, `rule` gives them for a
key (facts of the shape, the rule's parameters), and `candidates` are what `make tune` times beside
the rule. A launch takes `chosen`, where it is made for the first time; after that it is remembered.

Measured entries lie in measured/ARCHITECTURE.json, which a sweep has written: what it found to be
faster than the rule, by operation and key. The environment variable NANOTRON_FAST_MEASURED names
another file, or is `off`. It is read where a shape is met first.

Where a process has GPUs of two architectures, such a file serves those of its own, and the others
take rules. It is an error where there is none of its own. Launches are remembered by shape, so the
GPU that meets one first decides for both: that costs time, and no result. But a tile of `matmul`
may take more shared memory than the other has, which Triton says: there `off` is needed.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from nanotron_fast.kernels.runtime.backend import is_interpreting

ENVIRONMENT_VARIABLE = "NANOTRON_FAST_MEASURED"
FOLDER = Path(__file__).parents[1] / "measured"
# Every operation of a file, in the order in which its measurement is worth its time.
OPERATIONS = (
    "attention_order",
    "rms_norm_forward",
    "rms_norm_backward",
    "glu_forward",
    "glu_backward",
    "adamw",
    "cross_entropy_statistics",
    "cross_entropy_gradient",
    "rope",
    "attention_forward",
    "attention_dq",
    "attention_dkv",
    "linear_cross_entropy",
    "matmul_glu",
    "matmul_rope",
    "grad_norm",
    "clip_grads",
    "accumulate",
    "embedding_gather",
    "embedding_sum",
    "rope_normed_forward",
    "rope_normed_backward",
    "pack",
)

_forgotten: list[Callable[[], None]] = []
_pickers: list[Callable[[type[Tuned], dict[str, int]], Tuned | None]] = []


def remembered(function: Callable[..., Any]) -> Any:
    """lru_cache for what depends on what is chosen; `forget` empties it."""
    cached = lru_cache(maxsize=4096)(function)
    when_forgetting(cached.cache_clear)
    return cached


def when_forgetting(clear: Callable[[], None]) -> None:
    """Has `forget` call this as well, which empties another memory of what was chosen."""
    _forgotten.append(clear)


def forget() -> None:
    """Has everything be chosen anew."""
    for clear in _forgotten:
        clear()


@contextmanager
def picking(pick: Callable[[type[Tuned], dict[str, int]], Tuned | None]) -> Iterator[None]:
    """Launches take what `pick` gives for a class and a key, where that is not None."""
    _pickers.append(pick)
    forget()
    try:
        yield
    finally:
        _pickers.remove(pick)
        forget()


def powers_of_2(least: int, most: int) -> tuple[int, ...]:
    """Those from one to another, both powers of 2."""
    return tuple(1 << i for i in range(least.bit_length() - 1, most.bit_length()))


# What a field may be of which nothing else is said: elements of a block.
_USUAL = powers_of_2(16, 16384)


class Tuned:
    """The base of a frozen dataclass whose fields, whole numbers, say how a launch is made.

    A class names its operation and, by field, what a file may say where that is not as usual: a
    range of whole numbers, or powers of 2. Past it there is no such kernel, or its results are
    wrong.
    """

    operation: ClassVar[str]
    allowed: ClassVar[dict[str, Sequence[int]]] = {
        "num_warps": powers_of_2(1, 32),
        "num_stages": range(1, 9),
        "stages": range(1, 9),
    }

    def __init_subclass__(cls, operation: str, **allowed: Sequence[int]) -> None:
        assert operation in OPERATIONS, operation
        cls.operation = operation
        cls.allowed = cls.allowed | allowed

    @classmethod
    @remembered
    def chosen(cls, *, on: str = "", **key: int) -> Any:
        """What was measured for a key on an architecture, the current GPU's by default, or what the
        rule says.

        Raises ValueError, which names the file, the operation and the field, for a malformed file.
        """
        for pick in reversed(_pickers):
            picked = pick(cls, key)
            if picked is not None:
                return picked
        on = on or architecture()
        path = _path_of(on)
        entries = {} if path is None else cls._entries(path, on)
        return entries.get(tuple(sorted(key.items()))) or cls.rule(**key)

    @classmethod
    def candidates_for(cls, key: dict[str, int]) -> list[Any]:
        """What is worth timing beside the rule's for a key; nothing where there is no rule."""
        rule = cls.rule(**key)
        return [each for each in dict.fromkeys(rule.candidates()) if each != rule] if rule else []

    @classmethod
    def check(cls, where: str, config: dict[str, int], key: dict[str, int]) -> None:
        """Raises ValueError for a field of a configuration that no launch of the key can have."""
        for name, value in config.items():
            allowed = cls.allowed.get(name, _USUAL)
            if value not in allowed:
                what = "a power of 2" if isinstance(allowed, tuple) else "a whole number"
                raise ValueError(
                    f"{where}: field {name!r} of `config` is {value}, "
                    f"not {what} from {allowed[0]} to {allowed[-1]}"
                )

    @classmethod
    @remembered
    def _entries(cls, path: Path, on: str) -> dict[tuple[tuple[str, int], ...], Any]:
        of_key = inspect.signature(cls.rule).parameters
        of_config = [field.name for field in fields(cls)]
        found = {}
        entries = _read(path, on).get(cls.operation, [])
        for place, entry in enumerate(entries):
            where = f"{path}: {cls.operation}[{place}]"
            key = _numbers(where, "key", entry, of_key)
            config = _numbers(where, "config", entry, of_config)
            cls.check(where, config, key)
            found[tuple(sorted(key.items()))] = cls(**config)
        return found


def architecture() -> str:
    """Of the current GPU, "sm_90" for instance; "cpu" where kernels are interpreted, or compiled
    without one."""
    if is_interpreting() or not torch.cuda.is_available():
        return "cpu"
    return _of_gpu(torch.cuda.current_device())


def _of_gpu(place: int) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(place))


def _is_here(name: str) -> bool:
    """Whether a GPU of this process is of an architecture."""
    return architecture() != "cpu" and name in map(_of_gpu, range(torch.cuda.device_count()))


def _path_of(architecture: str) -> Path | None:
    asked = os.environ.get(ENVIRONMENT_VARIABLE) or ""
    if asked:
        return None if asked == "off" else Path(asked)
    path = FOLDER / f"{architecture}.json"
    return path if path.exists() else None


@remembered
def _read(path: Path, on: str) -> dict[str, Any]:
    """The entries of a file, by operation, for a GPU of an architecture; none where it is of
    another that is here as well. The file is looked at as a whole.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: measured entries cannot be read: {error}") from error
    entries = document.get("entries") if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: measured entries are an object with `entries`, by operation")
    if document.get("dry"):
        raise ValueError(f"{path}: is of a dry run, whose times say nothing")
    its = document.get("architecture")
    if its != on and not _is_here(its):
        raise ValueError(f"{path}: was measured on {its}, and this is {on}")
    for operation, of_operation in entries.items():
        if operation not in OPERATIONS:
            raise ValueError(f"{path}: {operation}: choose {', '.join(OPERATIONS)}")
        if not isinstance(of_operation, list):
            raise ValueError(f"{path}: {operation} is no list of entries")
    return entries if its == on else {}


def _numbers(where: str, part: str, entry: Any, names: Iterable[str]) -> dict[str, int]:
    """The key or the configuration of an entry. Raises ValueError."""
    values, names = entry.get(part) if isinstance(entry, Mapping) else None, list(names)
    if not isinstance(values, dict):
        raise ValueError(f"{where}: has no `{part}` of {', '.join(names)}")
    for name in (*values, *names):
        if name not in names:
            raise ValueError(f"{where}: unknown field {name!r} of `{part}`: {', '.join(names)}")
        value = values.get(name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{where}: field {name!r} of `{part}` is {value!r}, no whole number")
    return values
