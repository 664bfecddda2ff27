"""The YAML document itself: read from a file, and changed by the command line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanotron_fast.errors import ConfigError
from nanotron_fast.formats.plain_file import read_small


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises ConfigError, CheckpointError.

    A key that is there twice is refused: Nanotron takes the last, so that a section pasted in again
    would silently take the place of the first.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file")
    document = _parse(read_small(path), str(path))
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: not a mapping with sections such as general, model and tokens")
    return document


def override(document: dict[str, Any], overrides: Iterable[str]) -> frozenset[str]:
    """Sets values in a document, in place; returns the dotted paths that are from here alone.

    Each is `--section.key=value`, with or without the dashes, the value in YAML; an element of a
    list is named by its index, from 0. What a path leads through and is missing becomes a mapping,
    which is then read as strictly as the rest. Raises ConfigError.
    """
    paths: set[str] = set()
    for given in overrides:
        path, has_value, text = given.removeprefix("--").partition("=")
        if not has_value:
            raise ConfigError(f"{given}: it has no value; write --{path}=VALUE")
        if not all(path.split(".")):
            raise ConfigError(f"{given}: write --section.key=VALUE")
        _set(document, path, _parse(text.encode(), f"--{path}"), paths)
        paths.add(path)
    return frozenset(paths)


def _set(document: dict[str, Any], path: str, value: object, made: set[str]) -> None:
    """Sets one value; adds the paths of mappings that were missing to those that were made."""
    holder: Any = document
    *parents, last = path.split(".")
    for depth, key in enumerate(parents):
        name = ".".join(parents[: depth + 1])
        holder = _enter(holder, key, path, name, made)
    if isinstance(holder, list):
        holder[_index(holder, last, path)] = value
    else:
        holder[last] = value


def _enter(holder: Any, key: str, path: str, name: str, made: set[str]) -> Any:
    """What lies below a key, to set something in it: a mapping or a list."""
    if isinstance(holder, list):
        inner = holder[_index(holder, key, path)]
    else:
        if holder.get(key) is None:
            holder[key] = {}
            made.add(name)
        inner = holder[key]
    if not isinstance(inner, dict | list):
        raise ConfigError(f"--{path}: {name} is {inner!r}, which has nothing below it")
    return inner


def _index(holder: list[Any], key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(holder):
        raise ConfigError(
            f"--{path}: {key} should be the index of one of {len(holder)} elements, from 0"
        )
    return int(key)


def _parse(text: bytes, name: str) -> Any:
    """A YAML document, with plain values alone. Raises ConfigError."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses keys that are there twice: as written, before merges with `<<` add more."""

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node: yaml.MappingNode = super().compose_mapping_node(anchor)
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line, found = key.start_mark.line + 1, (key.tag, key.value)
                if found in lines:
                    raise ConfigError(
                        f"{name}: {key.value} is there twice, in line {lines[found]} and in line "
                        f"{line}: leave one of them"
                    )
                lines[found] = line
            return node

    try:
        return yaml.load(text, Loader)
    except yaml.reader.ReaderError as error:
        # Of bytes it says which encoding they are not in, and of characters "unicode".
        unit = "character" if error.encoding == "unicode" else "byte"
        raise ConfigError(
            f"{name}: not YAML at {unit} {error.position:,}, counted from 0: {error.reason}"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{name}: not YAML{where}: {problem}") from None
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except ValueError as error:
        # Dates that do not exist, integers of thousands of digits.
        raise ConfigError(f"{name}: not YAML: {error}") from None
