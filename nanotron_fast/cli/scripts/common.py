"""What both commands share: a conversion by one process or by those of torchrun."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from typing import Any

from nanotron_fast.cli.entry import EXIT_BAD_INPUT, run_command
from nanotron_fast.errors import NanotronFastError
from nanotron_fast.interruption import telling


def add_ignore_tensors(parser: ArgumentParser) -> None:
    """Adds the flag that leaves tensors out."""
    parser.add_argument(
        "--ignore_tensors",
        action="append",
        default=[],
        metavar="GLOB",
        help="Leave out tensors with such names; may be given several times",
    )


def run(source: str, destination: str, **choices: Any) -> None:
    """Converts and says so, and ends the process; `choices` are those of `_convert`."""
    run_command(lambda: _convert(source, destination, **choices))


def _convert(
    source: str,
    destination: str,
    *,
    direction: str,
    overwrite: bool,
    tp: int = 1,
    pp: int = 1,
    **choices: Any,
) -> None:
    """Converts and says so, or exits with code 2 and one message."""
    from nanotron_fast.checkpoints.convert import convert
    from nanotron_fast.checkpoints.processes import Processes, connect
    from nanotron_fast.cli.reporting import report_lines
    from nanotron_fast.model.topology import Topology

    processes = Processes()
    try:
        topology = Topology(tp=tp, pp=pp)
        processes = connect()
        report = convert(
            source,
            destination,
            to=direction,
            topology=topology,
            overwrite=overwrite,
            processes=processes,
            **choices,
        )
    except (NanotronFastError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    finally:
        processes.close()
    if processes.rank == 0:
        with telling(lambda: f"{report.destination} is whole"):
            for warning in report.plan.warnings:
                print(f"warning: {warning}", file=sys.stderr)
            for line in report_lines(report):
                print(line)
            print(f"Model saved to {destination}")
