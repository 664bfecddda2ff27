"""`nanotron-fast reshard`."""

from __future__ import annotations

from typing import Annotated

import typer

from nanotron_fast.cli.writing import (
    DryRun,
    Fsync,
    Io,
    Json,
    Manifest,
    Overwrite,
    OverwritePartial,
    Quiet,
    Resume,
    Workers,
    write,
)


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
    ep: Annotated[
        int | None,
        typer.Option(
            help="Ranks to split experts over, for this package's own class. (default: SRC's)"
        ),
    ] = None,
    zero_stage: Annotated[
        int | None,
        typer.Option(
            metavar="0|1",
            help="1 shares the optimizer's states out over data-parallel ranks. (default: as in "
            "SRC)",
        ),
    ] = None,
    workers: Workers = None,
    fsync: Fsync = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    overwrite_partial: OverwritePartial = False,
    io: Io = "auto",
    manifest: Manifest = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a Nanotron checkpoint at another topology, the states of training included.

    A run goes on from DST as it would have from SRC. DST appears when it is whole.
    """
    from nanotron_fast.checkpoints import reshard as resharding

    write(
        "resharding",
        resharding.plan,
        resharding.reshard,
        src,
        dst,
        choices={"tp": tp, "pp": pp, "dp": dp, "ep": ep, "zero_stage": zero_stage},
        options={
            "overwrite": overwrite,
            "fsync": fsync,
            "resume": resume,
            "overwrite_partial": overwrite_partial,
            "io": io,
            "manifest": manifest,
        },
        workers=workers,
        dry_run=dry_run,
        json=json,
        quiet=quiet,
    )
