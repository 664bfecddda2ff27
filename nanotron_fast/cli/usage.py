"""What is said of a command line that is no good: one line, with what may have been meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from nanotron_fast.cli.help import usage_line
from nanotron_fast.words import meant

_WORDS = (
    (re.compile(r"is not a valid int(eger)?( range)?"), "is no whole number"),
    (re.compile(r"is not a valid float( range)?"), "is no number"),
    (re.compile(r"^Got unexpected extra arguments?(\(s\))? \((.*)\)"), r"\2: more than is taken"),
    (re.compile(r"^Option '(.*)' does not take a value"), r"\1: it takes no value"),
)


def no_such_command(name: str, commands: Collection[str]) -> str:
    """What is wrong with a word that stands where a command should."""
    return f"{name}: there is no such command{meant(name, commands) or _see('nanotron-fast')}"


def what_is_wrong(error: Any) -> str:
    """One line of one of click's UsageErrors, whichever version of it is there."""
    context = getattr(error, "ctx", None)
    kind = type(error).__name__
    if kind == "BadOptionUsage" and "requires" in error.message:
        return f"{error.option_name}: it needs a value"
    if kind == "NoSuchOption" and context is not None:
        return _no_such_option(error.option_name, context)
    param = getattr(error, "param", None)
    if kind == "BadParameter" and param is not None:
        return f"{_spelled(param)}: {_in_words(error.message)}"
    message = error.format_message()
    said = _in_words(message)
    if kind == "MissingParameter" and param is not None:
        said = f"{_spelled(param)}: it is missing"
    elif not message.startswith("Got unexpected extra"):
        return said
    if context is None:
        return said
    return f"{said}; usage: {usage_line(context.command, context)}"


def _no_such_option(name: str, context: Any) -> str:
    said = f"{name}: {context.info_name} has no such option"
    likely = meant(name, options_of(context.command))
    if likely:
        return said + likely
    owners = _owners(name, context)
    if owners:
        return f"{said}; {' and '.join(owners)} {'have' if len(owners) > 1 else 'has'} it"
    return said + _see(context.command_path)


def options_of(command: Any) -> list[str]:
    """Every word that is an option of a command of click's."""
    return [
        word
        for each in command.params
        if each.param_type_name == "option"
        for word in (*each.opts, *each.secondary_opts)
    ] + ["--help"]


def _owners(name: str, context: Any) -> list[str]:
    """Other commands that have an option."""
    commands: Mapping[str, Any] = getattr(context.find_root().command, "commands", {})
    return [
        each
        for each, command in commands.items()
        if command is not context.command and name in options_of(command)
    ]


def _see(path: str) -> str:
    return f"; {path} --help lists them"


def _spelled(param: Any) -> str:
    if param.param_type_name == "argument":
        return str(param.metavar or param.name).upper().rstrip(".")
    return str(max(param.opts, key=len))


def _in_words(message: str) -> str:
    """Click's message without the names of its types."""
    for pattern, words in _WORDS:
        message = pattern.sub(words, message)
    return message.rstrip(".")
