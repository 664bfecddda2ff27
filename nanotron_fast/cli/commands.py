"""The command `nanotron-fast`.

What starts and ends it, exit codes included, is in `entry.py`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from nanotron_fast.checkpoints.options import Choices, InspectChoices, VerifyChoices
from nanotron_fast.cli.app import HERE, TRAINING, UNDER_NANOTRON, Command, app, command
from nanotron_fast.cli.entry import EXIT_DIFFERENT, run_command
from nanotron_fast.cli.generate import generate
from nanotron_fast.cli.help import RUNS
from nanotron_fast.cli.reshard import reshard
from nanotron_fast.cli.run import run
from nanotron_fast.cli.tokenize import tokenize
from nanotron_fast.cli.train import train
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
    print_json,
    print_lines,
    warn,
    write,
)
from nanotron_fast.errors import ConfigError
from nanotron_fast.version import __version__

__all__ = ["app", "main"]


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"nanotron-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@command
def convert(
    src: Annotated[str, typer.Argument(help="A directory in any format, a Hub id or a URL.")],
    dst: Annotated[str, typer.Argument(help="The directory to write, or a URL.")],
    *,
    choices: Choices,
    workers: Workers = None,
    fsync: Fsync = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    overwrite_partial: OverwritePartial = False,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            rich_help_panel=RUNS,
            help="Do the I-th of N shares, in a process of its own; --finish when all are done.",
        ),
    ] = None,
    finish: Annotated[
        bool,
        typer.Option(
            "--finish",
            rich_help_panel=RUNS,
            help="Prove that all shares are done, and make DST of them.",
        ),
    ] = False,
    io: Io = "auto",
    manifest: Manifest = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint to another format.

    DST appears when it is whole. On an error it is as it was before, and what was finished by then
    stays beside it, for --resume.
    """
    from nanotron_fast.checkpoints import convert as conversion

    write(
        "converting",
        conversion.plan,
        conversion.convert,
        src,
        dst,
        choices=choices,
        options={
            "overwrite": overwrite,
            "fsync": fsync,
            "resume": resume,
            "overwrite_partial": overwrite_partial,
            "share": _share(share),
            "finish": finish,
            "io": io,
            "manifest": manifest,
        },
        workers=workers,
        dry_run=dry_run,
        json=json,
        quiet=quiet,
    )


@command
def verify(
    a: Annotated[str, typer.Argument(help="A directory in any format, a Hub id or a URL.")],
    b: Annotated[
        str | None,
        typer.Argument(help="What to compare it with, likewise. (default: A's own manifest)"),
    ] = None,
    *,
    logits: Annotated[
        bool, typer.Option("--logits", help="Also run both and compare logits.")
    ] = False,
    choices: VerifyChoices,
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare every tensor of two checkpoints, in any two formats and topologies.

    With one alone: hash its tensors, and compare with the manifest that `convert --manifest` wrote.

    Exit code 1 says that something differs.
    """
    from nanotron_fast.cli import reporting
    from nanotron_fast.models import verifying

    is_silent = json or quiet
    if b is None:
        from nanotron_fast.cli import manifest

        found = manifest.check(
            a, logits=logits, choices=choices, workers=workers, is_quiet=is_silent
        )
        if json:
            print_json(found.to_json())
        elif not quiet:
            print_lines(reporting.manifest_lines(found))
        if not found.intact:
            raise typer.Exit(EXIT_DIFFERENT)
        return
    progress = reporting.Progress(is_quiet=is_silent)
    with progress.running("comparing") as on_progress:
        result = verifying.verify(
            a,
            b,
            logits=logits,
            workers=workers,
            on_plan=progress.expect,
            on_progress=on_progress,
            **choices,
        )
    if json:
        print_json(result.to_json())
    elif not quiet:
        warn(result.warnings)
        print_lines(reporting.verification_lines(result))
    if not result.equal:
        raise typer.Exit(EXIT_DIFFERENT)


@command
def inspect(
    path: Annotated[str, typer.Argument(help="A directory in any format, a Hub id or a URL.")],
    *,
    choices: InspectChoices,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a checkpoint is, from its headers."""
    from nanotron_fast.checkpoints import inspect as inspection
    from nanotron_fast.cli import reporting

    found = inspection.inspect(path, **choices)
    if json:
        print_json(found.to_json())
    elif not quiet:
        print_lines(reporting.inspection_lines(found))
        warn(found.warnings)


def env(json: Json = False) -> None:
    """Print versions, devices, what was built, and which path each operation takes."""
    from nanotron_fast.cli import environment

    found = environment.environment()
    if json:
        print_json(found.to_json())
    else:
        print_lines(environment.lines(found))


def doctor(
    place: Annotated[
        str | None,
        typer.Argument(
            metavar="DIR", help="Where checkpoints are to be written. (default: this directory)"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Say what would be slow or missing on this machine, and how to get it.

    Exit code 1 says that nothing can work here.
    """
    from nanotron_fast.cli import doctor as diagnosis

    found = diagnosis.diagnose(place)
    if json:
        print_json(found.to_json())
    else:
        print_lines(diagnosis.lines(found))
    if not found.is_usable:
        raise typer.Exit(EXIT_DIFFERENT)


def plot(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders that hold a metrics.jsonl.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The pictures, without .png and .svg. (default: training, in the folder of the "
            "run; of several runs here)",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Draw loss and throughput of one run or several, to PNG and SVG."""
    from nanotron_fast.train import plot as plotting

    written = [str(path) for path in plotting.plot(runs, output=output)]
    if json:
        print_json({"files": written})
    else:
        print_lines(written)


command(reshard)
command(train, TRAINING, {"allow_extra_args": True, "ignore_unknown_options": True})
command(tokenize, TRAINING)
command(generate, TRAINING)
command(plot, TRAINING)
app.command(
    cls=Command,
    rich_help_panel=UNDER_NANOTRON,
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False},
)(run)
command(env, HERE)
command(doctor, HERE)


def _share(given: str | None) -> tuple[int, int] | None:
    """I/N as two numbers. Raises ConfigError."""
    if given is None:
        return None
    number, slash, total = given.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal()):
        raise ConfigError(f"--share {given}: write I/N, such as 2/8")
    return int(number), int(total)


def main() -> None:
    """Runs the command."""
    run_command(lambda: app(prog_name="nanotron-fast"))
