"""What the commands that write a checkpoint have in common: their options, and how they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanotron_fast import interruption
from nanotron_fast.checkpoints.options import spelled
from nanotron_fast.cli.flags import beginning
from nanotron_fast.cli.help import RUNS
from nanotron_fast.errors import ConfigError, printable

if TYPE_CHECKING:
    from nanotron_fast.checkpoints.plan.plan import Plan


def _io_modes() -> Sequence[str]:
    from nanotron_fast.checkpoints.io_modes import MODES

    return MODES


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=RUNS, help="Threads. (default: one a core, 16 at most)"),
]
Fsync = Annotated[
    bool,
    typer.Option(
        "--fsync", rich_help_panel=RUNS, help="Return only when all of it is on the device."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a DST that is not empty, once done.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", rich_help_panel=RUNS, help="Go on with what an earlier run has finished."
    ),
]
OverwritePartial = Annotated[
    bool,
    typer.Option(
        "--overwrite-partial",
        rich_help_panel=RUNS,
        help="Give up what earlier runs have finished; with --resume, only what it cannot go on "
        "with.",
    ),
]
Io = Annotated[
    str,
    typer.Option(
        metavar="MODE",
        rich_help_panel=RUNS,
        autocompletion=beginning(_io_modes),
        help="auto, buffered (through the page cache), direct (past it) or dontcache (through it "
        "without staying there).",
    ),
]
Manifest = Annotated[
    bool,
    typer.Option(
        "--manifest",
        rich_help_panel=RUNS,
        help="Write the SHA-256 of every tensor, for verify DST.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan, from headers alone; write nothing.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors alone.")]


def write(
    verb: str,
    plan: Callable[..., Plan],
    carry_out: Callable[..., Any],
    src: str,
    dst: str,
    *,
    choices: Mapping[str, Any],
    options: Mapping[str, Any],
    workers: int | None,
    dry_run: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Runs a command, shows how far it is, and says what it did.

    Args:
        verb: for the progress.
        plan, carry_out: what plans it from `choices`, and what does it with `options` as well.
    """
    from nanotron_fast.checkpoints.processes import connect, told_rank
    from nanotron_fast.cli import reporting
    from nanotron_fast.moves import engine

    num_workers = workers or engine.default_workers()
    if dry_run:
        share = _dry_share(dst, options)
        if told_rank() > 0:
            return  # All would plan the same, and say so.
        planned = plan(src, dst, **choices)
        io = _io_of(planned, dst, options["io"])
        if json:
            print_json({**planned.to_json(num_workers, io=io), **_share_to_json(planned, share)})
        elif not quiet:
            print_lines(reporting.plan_lines(planned, num_workers, share, io=io))
            warn(planned.warnings)
        return
    processes = connect()
    is_silent = quiet or json or processes.rank != 0
    progress = reporting.Progress(is_quiet=is_silent)

    def on_plan(planned: Plan) -> None:
        if not is_silent:
            warn(planned.warnings)

    try:
        with progress.running(verb) as on_progress:
            report = carry_out(
                src,
                dst,
                workers=num_workers,
                on_plan=on_plan,
                on_total=progress.expect,
                on_progress=on_progress,
                processes=processes,
                **options,
                **choices,
            )
    finally:
        processes.close()
    with interruption.telling(lambda: f"{report.destination} is whole"):
        if not quiet:
            warn(report.warnings)
        if json and processes.rank == 0:
            print_json(report.to_json(num_workers))
        elif not is_silent:
            print_lines(reporting.report_lines(report))


def _dry_share(dst: str, options: Mapping[str, Any]) -> tuple[int, int] | None:
    """The share that is planned alone. Raises ConfigError for options that a plan cannot honour."""
    from nanotron_fast.checkpoints.carrying_out import check_choices
    from nanotron_fast.checkpoints.remote.urls import DESTINATION, as_path
    from nanotron_fast.checkpoints.settling import Wishes

    for name in ("resume", "overwrite_partial", "finish"):
        if options.get(name):
            raise ConfigError(
                f"{spelled(name)}: it has no meaning with --dry-run, which does not look at what "
                "earlier runs have left"
            )
    share: tuple[int, int] | None = options.get("share")
    choices = {name: options[name] for name in ("fsync", "io", "manifest")}
    check_choices(as_path(dst, DESTINATION), Wishes(share=share), **choices)
    return share


def _io_of(planned: Plan, dst: str, io: str) -> str:
    """How bytes would pass."""
    from nanotron_fast.checkpoints.io_modes import mode_for
    from nanotron_fast.checkpoints.remote.urls import DESTINATION, as_path, is_url

    place = as_path(dst, DESTINATION)
    if is_url(place):
        return "buffered"  # check_choices refuses all else
    return mode_for(io, Path(place), planned.bytes_read + planned.bytes_written)


def _share_to_json(planned: Plan, share: tuple[int, int] | None) -> dict[str, Any]:
    """Only where a share is planned alone; the rest of a plan is that of all."""
    if share is None:
        return {}
    part = planned.transfer.share(share[0] - 1, share[1])
    return {
        "share": {
            "number": share[0],
            "of": share[1],
            "tensor_files": len(part.outputs),
            "bytes_read": part.bytes_read,
            "bytes_written": part.bytes_written,
        }
    }


def print_lines(lines: Iterable[str]) -> None:
    """To stdout."""
    for line in lines:
        typer.echo(printable(line))


def warn(warnings: Iterable[str]) -> None:
    """To stderr."""
    for warning in warnings:
        typer.echo(f"warning: {printable(warning)}", err=True)


def print_json(document: Mapping[str, Any]) -> None:
    """To stdout."""
    import json

    typer.echo(json.dumps(document, indent=2))
