"""The application that the commands join: their help, and how each of their errors is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from nanotron_fast.cli import help as helping
from nanotron_fast.cli.entry import EXIT_BAD_INPUT
from nanotron_fast.cli.flags import with_flags
from nanotron_fast.errors import ConfigError, NanotronFastError, notes_of, one_line

# Of typer's own copy of click, whose name is none that typer promises; before 0.26, of click.
_errors = import_module(typer.BadParameter.__module__)
_UsageError, _MissingParameter = _errors.UsageError, _errors.MissingParameter

CHECKPOINTS, TRAINING, UNDER_NANOTRON, HERE = (
    "Checkpoints",
    "Training",
    "Under Nanotron",
    "This installation",
)


class Command(TyperCommand):
    """A command whose help is ours."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes it in the width and the colours of the terminal."""
        helping.write(self, ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads what stands behind the command.

        Up to typer 0.17, with click 8.3 and later, what is missing arrives as None.
        """
        left = list(super().parse_args(ctx, args))
        for each in self.params:
            if each.required and not ctx.resilient_parsing and ctx.params.get(each.name) is None:
                raise _MissingParameter(ctx=ctx, param=each)
        return left


class Group(TyperGroup):
    """All commands: their help, and what is said of a command line that is no good."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes it in the width and the colours of the terminal."""
        helping.write(self, ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads what stands before a command. With nothing at all there is help, and code 2."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help(), err=True)
            ctx.exit(EXIT_BAD_INPUT)
        try:
            return list(super().parse_args(ctx, args))
        except OSError as error:  # of the files that --install-completion writes
            _tell(error)
            raise typer.Exit(EXIT_BAD_INPUT) from None
        except typer.Exit as ended:
            if ended.exit_code == 0:
                raise
            _tell(ConfigError("completion is for bash, zsh, fish and PowerShell"))
            raise typer.Exit(EXIT_BAD_INPUT) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is asked for."""
        name = args[0]
        if name not in self.commands and not name.startswith("-") and not ctx.resilient_parsing:
            from nanotron_fast.cli.usage import no_such_command

            ctx.fail(no_such_command(name, self.commands))
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **options: Any) -> Any:
        """Runs a command, and unless told otherwise ends the process with its exit code."""
        ends_process = options.get("standalone_mode", True)
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
        except _UsageError as error:
            if not ends_process:
                raise
            from nanotron_fast.cli.usage import what_is_wrong

            _tell(ConfigError(what_is_wrong(error)))
            code = EXIT_BAD_INPUT
        if ends_process:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    name="nanotron-fast",
    cls=Group,
    help="Converts checkpoints between Hugging Face and Nanotron, bit-exact, at any topology, "
    "without a GPU; and trains Nanotron's models.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(
    body: Callable[..., None],
    group: str = CHECKPOINTS,
    context_settings: dict[str, Any] | None = None,
) -> Callable[..., None]:
    """Makes a command whose expected errors are one message and an exit code.

    A parameter of a type such as `Choices` stands for its flags; see `with_flags`.

    Args:
        group: the heading that help lists it under.
        context_settings: click's.
    """
    flagged = with_flags(body)

    @wraps(flagged)
    def run(**given: Any) -> None:
        if given["json"] or given.get("quiet"):
            # Before the Hub's library is imported: it draws bars of its own on stderr.
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
            os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        try:
            flagged(**given)
        except (NanotronFastError, OSError) as error:
            _tell(error)
            raise typer.Exit(EXIT_BAD_INPUT) from None

    app.command(cls=Command, rich_help_panel=group, context_settings=context_settings)(run)
    return body


def _tell(error: Exception) -> None:
    typer.echo(f"error: {one_line(error)}", err=True)
    for note in notes_of(error):
        typer.echo(note, err=True)
