"""Reading a YAML document from a checkpoint: the configuration of a training."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.plain_file import read_small

# Those of the largest runs, with thousands of data sets, have some hundred kilobytes.
_MAX_BYTES = 4 << 20
# Nanotron's own are nested about six deep.
_MAX_DEPTH = 64
# How many values a document may have when what it repeats is written out each time: as merges do.
_MAX_VALUES = 1_000_000
# Numbers to the base of 60, such as 1:30:00, take long to read where they have many places.
_LONG_NUMBER = re.compile(r"[-+0-9_:.\s]{1000,}")
# What PyYAML raises of a value that its tag does not fit, such as `!!bool x`, beside its own.
_OF_VALUES = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)


def read_yaml(path: Path) -> Any:
    """The document in a file. Raises CheckpointError, which names the file, or OSError."""
    import yaml

    # The parser in C, where PyYAML was built with it: in Python alone, to parse this one file takes
    # longer than all the rest of a plan. It ends the process where a document is nested too
    # deeply, so that is looked at first, in events, which it makes without recursion.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        data = read_small(path)
        if len(data) > _MAX_BYTES:
            raise CheckpointError(
                f"{path}: {len(data):,} bytes are over the limit of {_MAX_BYTES:,} for a "
                "configuration"
            )
        text = data.decode("utf-8")
        _check(path, yaml.parse(text, Loader=loader))
        return yaml.load(text, Loader=loader)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from None
    except CheckpointError:
        raise
    except (yaml.YAMLError, *_OF_VALUES) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: not YAML: {reason}") from None


def _check(path: Path, events: Iterable[Any]) -> None:
    """Refuses what is nested too deeply, holds itself, or is too large when it is written out."""
    import yaml

    # Of each collection that is open: its anchor, and how many values it has so far.
    open_ones: list[tuple[str | None, int]] = [(None, 0)]
    sizes: dict[str, int] = {}
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((event.anchor, 1))
            if len(open_ones) > _MAX_DEPTH + 1:
                raise CheckpointError(f"{path}: nested more than {_MAX_DEPTH} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_ones.pop()
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            if any(anchor == name for anchor, _ in open_ones):
                raise CheckpointError(f"{path}: {name[:80]} holds itself")
            size = sizes.get(name, 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if _LONG_NUMBER.fullmatch(event.value):
                raise CheckpointError(
                    f"{path}: it holds a number of {len(event.value):,} characters"
                )
        else:
            continue
        outer, number = open_ones[-1]
        open_ones[-1] = (outer, number + size)
        if number + size > _MAX_VALUES:
            raise CheckpointError(
                f"{path}: written out, it would have more than {_MAX_VALUES:,} values"
            )
