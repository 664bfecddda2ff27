"""Reading a pickle without executing anything that it holds.

A pickle is a program for a small machine with a stack. This machine has the instructions that make
strings, numbers and containers; for the others it asks a table of what a global name stands for,
and a name that is not there is an error. It never imports. Nothing that it makes is larger than
what the pickle spells out: a container that holds itself, one that is nested deeply, and one that
would be huge if its parts were written out each time are refused. Source of the instructions: the
comments of Python's pickletools.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from nanotron_fast.errors import CheckpointError

# How deep containers may lie in each other.
MAX_DEPTH = 64
# Larger than any seed or size that is kept in one.
_MAX_INTEGER_BYTES = 64
_MAX_KEY_ELEMENTS = 16
# Python finds the hash of a number by the remainder to this: larger ones may share it, all of them.
_HASH_MODULUS = 2**61 - 1
# So may tuples, of which no file has many as keys.
_MAX_TUPLE_KEYS = 4096
# A container takes many times the byte that makes it. Files have some 8 bytes for each.
_BYTES_FOR_CONTAINER = 3
_MIN_CONTAINERS = 10_000
_NEWEST_PROTOCOL = 5


class _Global:
    """A name that a pickle calls, and what is called for it."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        self.name, self.make = name, make


def unpickle(
    data: bytes,
    *,
    where: str,
    callables: Mapping[str, Callable[..., Any]],
    constants: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The document that a pickle makes.

    Args:
        data: the pickle; it ends where the data ends.
        where: what messages call it.
        callables: what is called for a global name, `module.name`, when the pickle calls it or
            makes an object of it. A state is given to the result's `__setstate__`, where it has
            one. What they make may be the key of a dictionary if it can be hashed in little time.
        constants: what other global names stand for.
        persistent: makes of a persistent id what it stands for.

    Raises CheckpointError, which names the global or the problem.
    """
    machine = _Machine(data, where, callables, constants, persistent)
    try:
        document = machine.run()
    except CheckpointError:
        raise
    except (
        *(ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
        struct.error,
    ) as error:
        raise CheckpointError(
            f"{where}: its pickle cannot be read: at byte {machine.at} "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from None
    _check_nesting(document, len(data), where)
    return document


class _Machine:
    def __init__(
        self,
        data: bytes,
        where: str,
        callables: Mapping[str, Callable[..., Any]],
        constants: Mapping[str, Any],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self._data, self._where = data, where
        self._callables, self._constants = callables, constants
        self._persistent = persistent
        self._stack: list[Any] = []
        # The stacks that marks have put aside.
        self._aside: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        # What lines of the pickle name: each tensor of a file names the same.
        self._named: dict[bytes, Any] = {}
        self._containers_left = max(_MIN_CONTAINERS, len(data) // _BYTES_FOR_CONTAINER)
        self._tuple_keys = 0
        self.at = 0

    def run(self) -> Any:
        data, size = self._data, len(self._data)
        instructions = _INSTRUCTIONS
        while self.at < size:
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return self._result()
            do = instructions.get(code)
            if do is None:
                raise self._error(f"the instruction {bytes([code])!r} is not one that is read")
            do(self)
        raise self._error("the pickle ends too early: truncated")

    def _result(self) -> Any:
        if self.at != len(self._data):
            raise self._error(f"{len(self._data) - self.at} bytes follow the pickle")
        if len(self._stack) != 1 or self._aside:
            raise self._error("the pickle does not make one document")
        return self._stack.pop()

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {problem}")

    def _take(self, size: int) -> bytes:
        start, end = self.at, self.at + size
        if end > len(self._data):
            raise self._error(
                f"the pickle speaks of {size} bytes at byte {start}, and has {len(self._data)} in "
                "all: truncated"
            )
        self.at = end
        return self._data[start:end]

    def _number(self, size: int) -> int:
        start, end = self.at, self.at + size
        if end > len(self._data):
            self._take(size)
        self.at = end
        return self._data[start] if size == 1 else int.from_bytes(self._data[start:end], "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at)
        if end < 0:
            raise self._error("the pickle ends too early: truncated")
        raw, self.at = self._data[self.at : end], end + 1
        return raw.decode()

    def _since_mark(self) -> list[Any]:
        items = self._stack
        if not self._aside:
            raise self._error("the pickle lacks a mark")
        self._stack = self._aside.pop()
        return items

    def _count(self) -> None:
        self._containers_left -= 1
        if self._containers_left < 0:
            raise self._error(
                f"a pickle of {len(self._data):,} bytes makes more lists, tuples, sets and "
                "dictionaries than any file of its size"
            )

    # --- Instructions

    def proto(self) -> None:
        if (version := self._number(1)) > _NEWEST_PROTOCOL:
            raise self._error(f"its pickle has protocol {version}; those up to 5 are read")

    def frame(self) -> None:
        self._number(8)

    def mark(self) -> None:
        self._count()
        self._aside.append(self._stack)
        self._stack = []

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def pop_mark(self) -> None:
        self._since_mark()

    def dup(self) -> None:
        self._stack.append(self._stack[-1])

    def put(self, size: int) -> None:
        self._memo[self._number(size)] = self._stack[-1]

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, size: int) -> None:
        self._stack.append(self._memo[self._number(size)])

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_empty(self, kind: Callable[[], Any]) -> None:
        self._count()
        self._stack.append(kind())

    def push_integer(self, size: int) -> None:
        self._stack.append(self._number(size))

    def signed(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def push_long(self, size: int) -> None:
        length = self._number(size)
        if length > _MAX_INTEGER_BYTES:
            raise self._error(f"the pickle holds an integer of {length} bytes")
        self._stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def push_float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def push_string(self, size: int) -> None:
        # As `_take` and `_number`, which half of a file's instructions would call.
        begin = self.at + size
        end = begin + int.from_bytes(self._data[self.at : begin], "little")
        if end > len(self._data):
            self._take(end - self.at)
        self.at = end
        self._stack.append(self._data[begin:end].decode("utf-8", "surrogatepass"))

    def push_bytes(self, size: int) -> None:
        self._stack.append(self._take(self._number(size)))

    def push_tuple(self) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def short_tuple(self, size: int) -> None:
        if len(self._stack) < size:
            raise self._error("the pickle takes from an empty stack")
        self._count()
        items = tuple(self._stack[-size:])
        self._stack[-size:] = [items]

    def push_list(self) -> None:
        items = self._since_mark()
        self._stack.append(items)

    def append(self) -> None:
        item = self._stack.pop()
        self._top(list).append(item)

    def appends(self) -> None:
        items = self._since_mark()
        self._top(list).extend(items)

    def add_items(self) -> None:
        items = self._since_mark()
        self._top(set).update(map(self._key, items))

    def frozen_set(self) -> None:
        items = self._since_mark()
        self._stack.append(frozenset(map(self._key, items)))

    def push_dict(self) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._set_items(items)

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def set_items(self) -> None:
        items = self._since_mark()
        self._set_items(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise self._error("the pickle gives a dictionary a key without a value")
        for index in range(0, len(items), 2):
            target[self._key(items[index])] = items[index + 1]

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise self._error(f"the pickle fills a {kind.__name__} that is not one")
        return self._stack[-1]

    def _key(self, key: Any) -> Any:
        """Refuses keys whose hash would take long to find, or would crash Python: nested ones."""
        if isinstance(key, int) and abs(key) >= _HASH_MODULUS:
            raise self._error(f"the pickle has a dictionary or a set with the key {key}")
        if isinstance(key, (str, bytes, int, float)) or key is None:
            return key
        if isinstance(key, tuple):
            is_flat = all(isinstance(each, (str, bytes, int, float)) for each in key)
            self._tuple_keys += 1
            too_many = self._tuple_keys > _MAX_TUPLE_KEYS
            if not is_flat or len(key) > _MAX_KEY_ELEMENTS or too_many:
                raise self._error("the pickle has a dictionary or a set with an unusual key")
        elif isinstance(key, (frozenset, _Global)):
            raise self._error("the pickle has a dictionary or a set with an unusual key")
        return key

    def stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self._error("the pickle names a global that is not text")
        self._global(module, name)

    def line_global(self) -> None:
        end = self._data.find(b"\n", self._data.find(b"\n", self.at) + 1)
        written = self._data[self.at : end]
        if written in self._named:
            self.at = end + 1
            self._stack.append(self._named[written])
            return
        module = self._line()
        self._global(module, self._line())
        self._named[written] = self._stack[-1]

    def _global(self, module: str, name: str) -> None:
        module = "builtins" if module == "__builtin__" else module
        full = f"{module}.{name}"
        if full in self._constants:
            self._stack.append(self._constants[full])
        elif full in self._callables:
            self._stack.append(_Global(full, self._callables[full]))
        else:
            raise self._error(
                f"it holds {full[:200]!r}, which is not read: a file may make such a thing run "
                "what it likes"
            )

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._count()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise self._error("the pickle calls what is not a function")
        self._stack.append(function.make(*arguments))

    def build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, dict):
            return  # Attributes of a dictionary, such as a state_dict's `_metadata`.
        restore = getattr(target, "__setstate__", None)
        if restore is None or isinstance(target, _Global):
            raise self._error(f"the pickle gives a {type(target).__name__} a state")
        restore(state)

    def persistent_id(self) -> None:
        key = self._stack.pop()
        if self._persistent is None:
            raise self._error("the pickle refers to something outside of it")
        self._stack.append(self._persistent(key))


def _with(do: Callable[[_Machine, Any], None], argument: Any) -> Callable[[_Machine], None]:
    return lambda machine: do(machine, argument)


_STOP = ord(".")
_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.proto,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord("0"): _Machine.pop,
    ord("1"): _Machine.pop_mark,
    ord("2"): _Machine.dup,
    ord("q"): _with(_Machine.put, 1),
    ord("r"): _with(_Machine.put, 4),
    0x94: _Machine.memoize,
    ord("h"): _with(_Machine.get, 1),
    ord("j"): _with(_Machine.get, 4),
    ord("N"): _with(_Machine.push, None),
    0x88: _with(_Machine.push, True),
    0x89: _with(_Machine.push, False),
    ord("K"): _with(_Machine.push_integer, 1),
    ord("M"): _with(_Machine.push_integer, 2),
    ord("J"): _Machine.signed,
    0x8A: _with(_Machine.push_long, 1),
    0x8B: _with(_Machine.push_long, 4),
    ord("G"): _Machine.push_float,
    0x8C: _with(_Machine.push_string, 1),
    ord("X"): _with(_Machine.push_string, 4),
    0x8D: _with(_Machine.push_string, 8),
    ord("C"): _with(_Machine.push_bytes, 1),
    ord("B"): _with(_Machine.push_bytes, 4),
    0x8E: _with(_Machine.push_bytes, 8),
    ord(")"): _with(_Machine.push, ()),
    ord("t"): _Machine.push_tuple,
    0x85: _with(_Machine.short_tuple, 1),
    0x86: _with(_Machine.short_tuple, 2),
    0x87: _with(_Machine.short_tuple, 3),
    ord("]"): _with(_Machine.push_empty, list),
    ord("l"): _Machine.push_list,
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("}"): _with(_Machine.push_empty, dict),
    ord("d"): _Machine.push_dict,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    0x8F: _with(_Machine.push_empty, set),
    0x90: _Machine.add_items,
    0x91: _Machine.frozen_set,
    ord("c"): _Machine.line_global,
    0x93: _Machine.stack_global,
    ord("R"): _Machine.reduce,
    0x81: _Machine.reduce,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent_id,
}


# What nothing lies in, and most of what lies in containers.
_LEAVES = frozenset({str, int, float, bool, bytes, type(None)})


def _check_nesting(document: Any, data_bytes: int, where: str) -> None:
    """Refuses what nobody can walk through: cycles, depth, and parts that are shared too often."""
    most = 16 * data_bytes + 1024
    sizes: dict[int, int] = {}
    heights: dict[int, int] = {}
    open_ones: set[int] = set()
    pending: list[tuple[Any, bool]] = [(document, False)]
    while pending:
        value, is_done = pending.pop()
        children = _children(value)
        key = id(value)
        if is_done:
            open_ones.discard(key)
            inner = [id(child) for child in children]
            sizes[key] = 1 + sum(sizes.get(each, 1) for each in inner)
            heights[key] = 1 + max((heights.get(each, 0) for each in inner), default=0)
            if heights[key] > MAX_DEPTH:
                raise CheckpointError(f"{where}: its pickle is nested deeper than {MAX_DEPTH}")
            if sizes[key] > most:
                raise CheckpointError(f"{where}: its pickle repeats its parts too often")
        elif isinstance(value, _Global):
            raise CheckpointError(f"{where}: its pickle holds a function, not a value")
        elif key in open_ones:
            raise CheckpointError(f"{where}: its pickle holds something that holds itself")
        elif key not in sizes and isinstance(value, (dict, list, tuple, set, frozenset)):
            open_ones.add(key)
            pending.append((value, True))
            pending.extend(
                (child, False)
                for child in children
                if type(child) not in _LEAVES and id(child) not in sizes
            )


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else []
