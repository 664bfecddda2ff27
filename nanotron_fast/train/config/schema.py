"""Documents read strictly into frozen dataclasses, and written from them.

A section of the schema is a dataclass whose annotations say what a field may hold: `bool`, `int`,
`float`, `str`, a `Literal`, a `tuple` of one kind, a mapping, another section, or a union of these.
`Annotated` adds what an annotation alone cannot say: bounds, other spellings, and how to tell apart
sections that may stand in one place. A section that has a `prepared(document, place)` gets its
mapping through it first: that is where older or shorter ways to say the same become the one way.
"""

from __future__ import annotations

import difflib
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from nanotron_fast.errors import ConfigError
from nanotron_fast.train.config.place import Place, shown

Section = TypeVar("Section")

# For `field(metadata=...)`: null stands for the default, as in Nanotron's own classes; it does, and
# the key must be there all the same; a null is not written, since Nanotron cannot read it back;
# Nanotron has no such field; no document has it.
FILLED = {"null_is_default": True}
FILLED_AND_REQUIRED = {"null_is_default": True, "is_required": True}
UNWRITTEN_NULL = {"is_left_out_if_null": True}
OURS = {"is_ours": True}
INTERNAL = {"is_internal": True}


@dataclass(frozen=True)
class Bound:
    """A bound of a number: what stands before it in words, and what it is held by."""

    bound: float
    words: ClassVar[str]
    holds: ClassVar[staticmethod[[Any, Any], bool]]


class AtLeast(Bound):
    """A lower bound, which is allowed itself."""

    words, holds = "of at least", staticmethod(operator.ge)


class Above(Bound):
    """A lower bound, which is not."""

    words, holds = "above", staticmethod(operator.gt)


class Below(Bound):
    """An upper bound, which is not allowed itself."""

    words, holds = "below", staticmethod(operator.lt)


@dataclass(frozen=True, slots=True)
class Spelled:
    """How other spellings of a text become the one that is kept."""

    normalise: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class ToldApart:
    """Chooses which of several sections a mapping is. It may raise ConfigError."""

    choose: Callable[[Mapping[str, Any], Place], type]


Count = Annotated[int, AtLeast(1)]
Amount = Annotated[int, AtLeast(0)]
Fraction = Annotated[float, AtLeast(0), Below(1)]


def read(section: type[Section], document: object, place: Place) -> Section:
    """A section from its part of a document. Raises ConfigError, which names the place."""
    known = _fields_of(section)
    if not isinstance(document, Mapping):
        raise place.wrong(document, wanted(section))
    prepare: Any = getattr(section, "prepared", None)
    given: Mapping[Any, Any] = document if prepare is None else prepare(document, place)
    for key in given:
        if key not in known:
            raise place.at(key).error(unknown_key(key, known))
    values: dict[str, Any] = {}
    for name, (described, kind) in known.items():
        if name not in given:
            if _is_required(described):
                raise place.at(name).error(f" is missing, and should be {wanted(kind)}")
            continue
        value = given[name]
        if value is None and described.metadata.get("null_is_default"):
            continue
        values[name] = _read(kind, value, place.at(name))
    return section(**values)


def write(value: Any, *, with_ours: bool = True) -> Any:
    """The document of a section: mappings, lists and plain values, in the order of the fields.

    `with_ours=False` leaves out the fields that Nanotron does not have.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {
            name: write(getattr(value, name), with_ours=with_ours)
            for name, (described, _) in _fields_of(type(value)).items()
            if (with_ours or not described.metadata.get("is_ours"))
            and (
                getattr(value, name) is not None
                or not described.metadata.get("is_left_out_if_null")
            )
        }
    if isinstance(value, Mapping):
        return {key: write(item, with_ours=with_ours) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [write(item, with_ours=with_ours) for item in value]
    return value


def write_ours(value: Any) -> dict[str, Any]:
    """The fields alone that Nanotron does not have and that are not at their defaults, nested."""
    found: dict[str, Any] = {}
    for name, (described, _) in _fields_of(type(value)).items():
        item = getattr(value, name)
        if described.metadata.get("is_ours"):
            if item != described.default:
                found[name] = write(item)
        elif is_dataclass(item):
            below = write_ours(item)
            if below:
                found[name] = below
    return found


def unknown_key(key: object, known: Iterable[str]) -> str:
    """What follows the name of a key that nothing knows: a suggestion, or what there is."""
    names = list(known)
    close = difflib.get_close_matches(str(key), names, n=1)
    more = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    return f" is not known: {more}"


def wanted(kind: Any) -> str:
    """What a field may hold, in words."""
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *notes = get_args(kind)
        bounds = [f"{note.words} {note.bound:g}" for note in notes if isinstance(note, Bound)]
        return f"{wanted(inner)}{' ' if bounds else ''}{' and '.join(bounds)}"
    if origin is Literal:
        return " or ".join(map(shown, get_args(kind)))
    if origin in (Union, types.UnionType):
        return " or ".join(map(wanted, get_args(kind)))
    if origin is tuple:
        return f"a list, each of it {wanted(get_args(kind)[0])}"
    if is_dataclass(kind):
        known = _fields_of(kind)
        needed = [name for name, (described, _) in known.items() if _is_required(described)]
        return f"a mapping with {', '.join(needed or known)}"
    if origin is not None or kind is Any:
        return "a mapping"
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        type(None): "null",
    }
    return names[kind]


def _read(kind: Any, value: object, place: Place) -> Any:
    origin = get_origin(kind)
    if origin is Annotated:
        return _read_annotated(kind, value, place)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(kind), value, place, wanted(kind))
    if origin is Literal:
        # By type as well: True is 1 to Python.
        if not any(value == each and type(value) is type(each) for each in get_args(kind)):
            raise place.wrong(value, wanted(kind))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise place.wrong(value, wanted(kind))
        inner = get_args(kind)[0]
        return tuple(_read(inner, item, place.at(index)) for index, item in enumerate(value))
    if is_dataclass(kind):
        return read(typing.cast(type, kind), value, place)
    if kind is Any:
        return value
    if origin is not None:
        if not isinstance(value, Mapping):
            raise place.wrong(value, wanted(kind))
        inner = get_args(kind)[1]
        return {key: _read(inner, item, place.at(key)) for key, item in value.items()}
    return _read_plain(kind, value, place)


def _read_plain(kind: type, value: object, place: Place) -> Any:
    if kind is float:
        return _read_float(value, place)
    # A bool is an int to Python, and never to a user.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise place.wrong(value, wanted(kind))
    return value


def _read_float(value: object, place: Place) -> float:
    """A finite number. "1e-5" is text to YAML 1.1, and a number to everybody else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise place.wrong(value, wanted(float)) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise place.wrong(value, wanted(float))
    return float(value)


def _read_annotated(kind: Any, value: object, place: Place) -> Any:
    inner, *notes = get_args(kind)
    for note in notes:
        if isinstance(note, Spelled) and isinstance(value, str):
            value = note.normalise(value)
        if isinstance(note, ToldApart) and isinstance(value, Mapping):
            return read(note.choose(value, place), value, place)
    try:
        result = _read(inner, value, place)
    except ConfigError:
        # Of a section the field within it is named; of a plain value, all that it should be.
        if isinstance(value, Mapping | list):
            raise
        raise place.wrong(value, wanted(kind)) from None
    for note in notes:
        if isinstance(note, Bound) and not note.holds(result, note.bound):
            raise place.wrong(value, wanted(kind))
    return result


def _read_union(kinds: tuple[Any, ...], value: object, place: Place, words: str) -> Any:
    """What the first of several kinds makes of a value."""
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        try:
            return _read(others[0], value, place)
        except ConfigError:
            # As in _read_annotated: null would do as well.
            if isinstance(value, Mapping | list):
                raise
            raise place.wrong(value, words) from None
    for kind in others:
        if isinstance(value, _python_type(kind)):
            return _read(kind, value, place)
    raise place.wrong(value, words)


def _python_type(kind: Any) -> Any:
    """What Python makes of the YAML that a kind is read from."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _python_type(get_args(kind)[0])
    if origin is tuple:
        return list | tuple
    if origin is not None or is_dataclass(kind):
        return Mapping
    return int | float if kind is float else kind


def _fields_of(section: Any) -> Mapping[str, tuple[Field[Any], Any]]:
    """The fields of a section that a document has, each with its resolved annotation."""
    return _resolved(section)


@cache
def _resolved(section: Any) -> Mapping[str, tuple[Field[Any], Any]]:
    hints = typing.get_type_hints(section, include_extras=True)
    return {
        each.name: (each, hints[each.name])
        for each in fields(section)
        if not each.metadata.get("is_internal")
    }


def _is_required(described: Field[Any]) -> bool:
    if described.metadata.get("is_required"):
        return True
    return described.default is MISSING and described.default_factory is MISSING
