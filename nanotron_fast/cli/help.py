"""How help is laid out: at any width every option has its whole name, and examples end it.

Nothing is imported for it that a start does not need anyway.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from inspect import cleandoc
from textwrap import wrap
from typing import Any, NamedTuple

import typer

from nanotron_fast.checkpoints.options import DETAILS, FILES
from nanotron_fast.cli.entry import EXIT_CODES
from nanotron_fast.cli.examples import EXAMPLES

# Of the options that say how the work is done.
RUNS = "How it runs"
_OPTIONS = "Options"
# What most need first.
_GROUPS = (_OPTIONS, RUNS, FILES, DETAILS)
# Lines that are longer are read with difficulty; below, words no longer fit.
_MOST_COLUMNS, _FEWEST_COLUMNS = 100, 40
# A name that is longer has a line of its own.
_LONGEST_BESIDE = 29
# Where less is left beside the names, each has a line of its own.
_FEWEST_BESIDE = 44
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_VALUES = {"integer": "N", "int": "N", "float": "X"}


class Row(NamedTuple):
    """A name, and what is said of it."""

    name: str
    text: str


def write(command: Any, context: Any, formatter: Any) -> None:
    """Writes the help of a command, or of all of them, to click's formatter."""
    width = min(shutil.get_terminal_size().columns, _MOST_COLUMNS)
    # What click does with the text at the end.
    context.color = has_colour()
    text = "\n".join(_lines(command, context, max(width, _FEWEST_COLUMNS)))
    formatter.write(text if context.color else _STYLE.sub("", text))


def has_colour() -> bool:
    """Whether stdout takes colours: NO_COLOR forbids them, FORCE_COLOR has them in a file too."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _lines(command: Any, context: Any, width: int) -> Iterator[str]:
    yield from _usage(command, context, width)
    for paragraph in cleandoc(command.help or "").split("\n\n"):
        yield ""
        yield from _wrapped(paragraph, width)
    parameters = [each for each in command.get_params(context) if not getattr(each, "hidden", 0)]
    arguments = [each for each in parameters if each.param_type_name == "argument"]
    yield from _section("Arguments", [_row_of_argument(each) for each in arguments], width)
    yield from _commands(command, context, width)
    options = [each for each in parameters if each.param_type_name == "option"]
    groups: dict[str, list[Row]] = {name: [] for name in _GROUPS}
    for each in options:
        name = getattr(each, "rich_help_panel", None) or _OPTIONS
        groups.setdefault(name, []).append(_row_of_option(each))
    beside = _column(row for rows in groups.values() for row in rows)
    for name, rows in groups.items():
        yield from _section(name, rows, width, beside)
    yield from _examples("" if hasattr(command, "commands") else command.name, width)
    if hasattr(command, "commands"):
        yield from _section("Exit codes", [Row(*each) for each in EXIT_CODES], width)


def _usage(command: Any, context: Any, width: int) -> Iterator[str]:
    lines = wrap(
        usage_line(command, context), width - 7, break_on_hyphens=False, break_long_words=False
    )
    yield f"{_heading('Usage:')} {lines[0]}"
    for line in lines[1:]:
        yield f"       {line}"


def usage_line(command: Any, context: Any) -> str:
    """Such as "nanotron-fast convert [OPTIONS] SRC DST"."""
    words = [context.command_path, "[OPTIONS]"]
    words += [_name_of(each) for each in command.params if each.param_type_name == "argument"]
    if hasattr(command, "commands"):
        words.append("COMMAND ...")
    elif context.allow_extra_args:
        words.append("...")
    return " ".join(words)


def _name_of(argument: Any) -> str:
    name = str(argument.metavar or argument.name).upper()
    return name if argument.required else f"[{name}]"


def _row_of_argument(argument: Any) -> Row:
    return Row(_name_of(argument).strip("[]"), argument.help or "")


def names_of(option: Any) -> str:
    """Such as "-h, --help" and "--io MODE"."""
    names = ", ".join(sorted(option.opts, key=len))
    if option.secondary_opts:
        names += f" / {', '.join(option.secondary_opts)}"
    elif not option.is_flag:
        names += f" {option.metavar or _VALUES.get(_kind(option), 'TEXT')}"
    return names


def _row_of_option(option: Any) -> Row:
    return Row(names_of(option), f"{option.help or ''}{_default(option)}")


def _kind(option: Any) -> str:
    return str(option.type.name).split()[0].lower()


def _default(option: Any) -> str:
    if option.required:
        return " (required)"
    value = option.default
    if value is None or value is False or value == () or "(default: " in (option.help or ""):
        return ""
    return f" (default: {option.opts[0] if value is True else value})" if _is_shown(value) else ""


def _is_shown(value: Any) -> bool:
    """Click has a value of its own for a default that there is not."""
    return isinstance(value, str | int | float)


def _commands(command: Any, context: Any, width: int) -> Iterator[str]:
    groups: dict[str, list[Row]] = {}
    for name in getattr(command, "commands", {}):
        each = command.get_command(context, name)
        text = " ".join(cleandoc(each.help or "").split("\n\n")[0].split())
        groups.setdefault(each.rich_help_panel or "Commands", []).append(Row(name, text))
    beside = _column(row for rows in groups.values() for row in rows)
    for name, rows in groups.items():
        yield from _section(name, rows, width, beside)


def _column(rows: Iterable[Row]) -> int:
    lengths = [len(row.name) for row in rows if len(row.name) <= _LONGEST_BESIDE]
    return max(lengths, default=0) + 4


def _section(title: str, rows: list[Row], width: int, column: int | None = None) -> Iterator[str]:
    """A heading, and names with their texts beside or below them; nothing where there is none."""
    if not rows:
        return
    column = _column(rows) if column is None else column
    is_beside = width - column >= _FEWEST_BESIDE or column <= width // 4
    indent = column if is_beside else 8
    yield ""
    yield _heading(f"{title}:")
    for name, text in rows:
        lines = _wrapped(text, width, indent)
        shown = f"  {typer.style(name, fg=typer.colors.CYAN, bold=True)}"
        if is_beside and len(name) + 4 <= column and lines:
            yield f"{shown}{' ' * (column - 2 - len(name))}{lines[0].lstrip()}"
            lines = lines[1:]
        else:
            yield shown
        yield from lines


def _wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """Names of options and paths are not cut."""
    space = " " * indent
    return wrap(
        " ".join(text.split()),
        width,
        initial_indent=space,
        subsequent_indent=space,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _examples(name: str, width: int) -> Iterator[str]:
    if name not in EXAMPLES:
        return
    yield ""
    yield _heading("Examples:")
    for example in EXAMPLES[name]:
        yield from _wrapped(example.purpose, width, 2)
        yield from shell_lines(example.command, width, 4)


def shell_lines(command: str, width: int, indent: int) -> list[str]:
    """A command in lines that a shell takes as one; what is quoted stays whole."""
    words = re.findall(r"(?:'[^']*'|\"[^\"]*\"|[^\s'\"])+", command)
    lines = [" " * indent + words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) + 2 > width:
            lines[-1] += " \\"
            lines.append(" " * (indent + 2) + word)
        else:
            lines[-1] += f" {word}"
    return lines


def _heading(text: str) -> str:
    return typer.style(text, bold=True)
