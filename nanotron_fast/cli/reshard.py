"""`nanotron-fast reshard`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanotron_fast import interruption

if TYPE_CHECKING:
    from nanotron_fast.checkpoints.plan.plan import Plan


def reshard(
    src: Annotated[str, typer.Argument(help="A checkpoint of Nanotron's, or a run's folder.")],
    dst: Annotated[str, typer.Argument(help="The directory to write.")],
    *,
    tp: Annotated[
        int | None, typer.Option(help="Tensor-parallel ranks. (default: as in SRC)")
    ] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages. (default: as in SRC)")] = None,
    dp: Annotated[
        int | None, typer.Option(help="Data-parallel ranks. (default: as in SRC)")
    ] = None,
    ep: Annotated[int, typer.Option(help="Expert-parallel ranks: 1.")] = 1,
    zero_stage: Annotated[
        int | None,
        typer.Option(
            metavar="0|1",
            help="1 shares the optimizer's states out over data-parallel ranks. (default: as in "
            "SRC)",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads. (default: one a core, 16 at most)")
    ] = None,
    fsync: Annotated[
        bool, typer.Option("--fsync", help="Return only when all of it is on the device.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a DST that is not empty, once done.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an earlier run has finished.")
    ] = False,
    overwrite_partial: Annotated[
        bool, typer.Option("--overwrite-partial", help="Give up what earlier runs have finished.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, from headers alone; write nothing.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors alone.")] = False,
) -> None:
    """Write a Nanotron checkpoint at another topology, the states of training included.

    A run goes on from DST as it would have from SRC. DST appears when it is whole.
    """
    from nanotron_fast.checkpoints import reshard as resharding
    from nanotron_fast.checkpoints.processes import connect
    from nanotron_fast.cli import reporting
    from nanotron_fast.moves import engine

    num_workers = workers or engine.default_workers()
    choices: dict[str, Any] = {"tp": tp, "pp": pp, "dp": dp, "ep": ep, "zero_stage": zero_stage}
    if dry_run:
        plan = resharding.plan(src, dst, **choices)
        if json:
            _print_json(plan.to_json(num_workers))
        elif not quiet:
            _print(reporting.plan_lines(plan, num_workers))
            _warn(plan.warnings)
        return
    processes = connect()
    is_silent = quiet or json or processes.rank != 0
    progress = reporting.Progress(is_quiet=is_silent)

    def on_plan(plan: Plan) -> None:
        if not is_silent:
            _warn(plan.warnings)

    try:
        with progress.running("resharding") as on_progress:
            report = resharding.reshard(
                src,
                dst,
                overwrite=overwrite,
                workers=num_workers,
                fsync=fsync,
                resume=resume,
                overwrite_partial=overwrite_partial,
                on_plan=on_plan,
                on_total=progress.expect,
                on_progress=on_progress,
                processes=processes,
                **choices,
            )
    finally:
        processes.close()
    with interruption.telling(lambda: f"{report.destination} is whole"):
        _warn(report.warnings)
        if json and processes.rank == 0:
            _print_json(report.to_json(num_workers))
        elif not is_silent:
            _print(reporting.report_lines(report))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def _print_json(document: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(document, indent=2))
