"""What both commands share: a conversion by one process or by those of torchrun."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, BooleanOptionalAction
from typing import Any

from nanotron_fast.checkpoints.options import Choices
from nanotron_fast.cli.entry import EXIT_BAD_INPUT, run_command
from nanotron_fast.cli.flags import flags, gather
from nanotron_fast.errors import NanotronFastError, one_line, printable
from nanotron_fast.interruption import telling


def add_flags(parser: ArgumentParser, **spellings: str) -> None:
    """Adds flags of `nanotron-fast convert`, each as these commands have always spelled it."""
    for flag in flags(Choices):
        if flag.name not in spellings:
            continue
        how: dict[str, Any] = {"metavar": flag.metavar, "type": flag.kind}
        if flag.kind is bool:
            how = {"action": BooleanOptionalAction}
        elif flag.kind is list:
            how = {"metavar": flag.metavar, "action": "append"}
        spelling = spellings[flag.name]
        parser.add_argument(spelling, dest=flag.name, default=flag.default, help=flag.help, **how)


def run(parser: ArgumentParser, *, to: str) -> None:
    """Reads the command line, converts, says so, and ends the process."""
    given = vars(parser.parse_args())
    run_command(lambda: _convert(given, to))


def _convert(given: dict[str, Any], to: str) -> None:
    """Converts and says so, or exits with code 2 and one message."""
    from nanotron_fast.checkpoints.convert import convert
    from nanotron_fast.checkpoints.processes import Processes, connect
    from nanotron_fast.cli.reporting import report_lines

    processes = Processes()
    try:
        choices: Choices = gather(Choices, {**given, "to": to})
        processes = connect()
        report = convert(
            given["checkpoint_path"],
            given["save_path"],
            overwrite=given["overwrite"],
            processes=processes,
            **choices,
        )
    except (NanotronFastError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    finally:
        processes.close()
    if processes.rank == 0:
        with telling(lambda: f"{report.destination} is whole"):
            for warning in report.plan.warnings:
                print(f"warning: {printable(warning)}", file=sys.stderr)
            for line in report_lines(report):
                print(printable(line))
            print(f"Model saved to {given['save_path']}")
