"""The flags of a command, made from the fields of `checkpoints.options.Options`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints, is_typeddict

from nanotron_fast.checkpoints.options import described


class Flag(NamedTuple):
    """One flag. `kind` is the type of its value, or `list` where it may be given several times.

    `group` is the heading that help lists it under, and `values` are those that a shell completes.
    """

    name: str
    kind: type
    default: Any
    help: str
    metavar: str | None
    group: str | None
    values: Callable[[], Sequence[str]] | None


def flags(among: type) -> Iterator[Flag]:
    """Those of the options of a class such as `VerifyChoices`."""
    types = get_type_hints(among)
    for name, option in described(among).items():
        for part, text in option.parts.items():
            default = getattr(option.default, part)
            yield Flag(part, type(default), default, text, option.metavar, option.group, None)
        if not option.parts:
            given = types[name]
            kind = list if get_origin(given) is Sequence else next(iter(get_args(given)), given)
            default = option.written or option.default or None
            shown = (option.help, option.metavar, option.group, option.values)
            yield Flag(name, kind, default, *shown)


def gather(among: type, given: dict[str, Any]) -> Any:
    """Takes the flags out of what a command was given, and returns the options that they make.

    Raises TopologyError.
    """
    choices: dict[str, Any] = {}
    for name, option in described(among).items():
        if option.parts:
            parts = {part: given.pop(part) for part in option.parts if part in given}
            choices[name] = type(option.default)(**parts)
        elif name in given:
            choices[name] = given.pop(name)
    return choices


def beginning(values: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """For typer: those of an option's values that begin as what has been typed of one."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values() if value.startswith(incomplete)]

    return complete


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, in which a parameter of a type such as `Choices` is all of its flags.

    The flags are listed where the parameter stands, and it gets the options that they make.
    """
    import typer

    parameters: list[inspect.Parameter] = []
    expanded: dict[str, type] = {}
    # Not by get_type_hints: of what is None by default, Python 3.10's hides the Annotated, and what
    # it says to typer, in an Optional.
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        hint = parameter.annotation
        if not is_typeddict(hint):
            parameters.append(parameter.replace(annotation=hint))
            continue
        expanded[parameter.name] = hint
        for flag in flags(hint):
            parameters.append(
                parameter.replace(
                    name=flag.name,
                    default=typer.Option(
                        flag.default,
                        help=flag.help,
                        metavar=flag.metavar,
                        rich_help_panel=flag.group,
                        autocompletion=flag.values and beginning(flag.values),
                    ),
                    annotation=list[str] | None if flag.kind is list else flag.kind | None,
                )
            )

    @wraps(command)
    def run(**given: Any) -> None:
        choices = {name: gather(among, given) for name, among in expanded.items()}
        command(**choices, **given)

    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
