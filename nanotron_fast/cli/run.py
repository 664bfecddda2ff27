"""`nanotron-fast run`: a script of Nanotron's with our kernels under it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nanotron_fast import interruption
from nanotron_fast.cli.entry import EXIT_BAD_INPUT
from nanotron_fast.errors import NanotronFastError, one_line


def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="A script that trains with Nanotron.")],
    cpu: Annotated[bool, typer.Option("--cpu", help="Without a GPU: over gloo.")] = False,
    ops: Annotated[
        str | None,
        typer.Option(
            help="Operations to replace, with commas. (default: NANOTRON_FAST_OPS, or all)"
        ),
    ] = None,
    rope_scaling: Annotated[
        bool, typer.Option("--rope-scaling", help="Honour rope_scaling, which Nanotron ignores.")
    ] = False,
    z_loss: Annotated[
        str, typer.Option(metavar="nanotron|correct", help="How z-loss takes its log-sum-exp.")
    ] = "nanotron",
    fused: Annotated[
        bool, typer.Option("--fused", help="Whole blocks as single functions, too.")
    ] = False,
) -> None:
    """Run a script of Nanotron's with our kernels under it; what follows SCRIPT is its own."""
    interruption.restore()
    try:
        from nanotron_fast.patch import launcher
        from nanotron_fast.patch.nanotron.registry import requested_ops

        launcher.run(
            script,
            context.args,
            on_cpu=cpu,
            ops=requested_ops() if ops is None else {each.strip() for each in ops.split(",")},
            rope_scaling=rope_scaling,
            z_loss_mode=z_loss,
            fused=fused,
        )
    except NanotronFastError as error:
        typer.echo(f"error: {one_line(error)}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except Exception:
        # The script's own: it ends as `python script` does.
        sys.excepthook(*sys.exc_info())
        raise typer.Exit(1) from None
