"""`nanotron-fast train`: a run of training, or what it would come to."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanotron_fast import interruption
from nanotron_fast.cli.entry import EXIT_BAD_INPUT, EXIT_FAULT

if TYPE_CHECKING:
    from nanotron_fast.train import TrainingResult


def train(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="A YAML file as Nanotron's.")],
    *,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print parameters, stages, FLOPs, memory; train nothing."),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="With --dry-run: of one rank, such as 80GB; says what to change."
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors alone.")] = False,
) -> None:
    """Train a model: --section.key=value changes what CONFIG says.

    Under torchrun the ranks share the work. SIGTERM and SIGUSR1 save a checkpoint and end the run.
    """
    interruption.install(signal.SIGUSR1)
    from nanotron_fast.cli.dry_run import overrides_of
    from nanotron_fast.cli.usage import options_of
    from nanotron_fast.errors import ConfigError

    overrides = overrides_of(context.args, options_of(context.command))
    if dry_run:
        _dry_run(config, overrides, memory, json=json, is_quiet=quiet)
        return
    if memory is not None:
        raise ConfigError("--memory goes with --dry-run: it says whether a run would fit")
    with _told_once():
        result = _run(config, overrides, is_quiet=quiet or json)
    if _rank() == 0:
        with interruption.telling(lambda: "the run is at its end"):
            _tell(result, json=json, is_quiet=quiet)


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)


def _dry_run(
    config: str, overrides: list[str], memory: str | None, *, json: bool, is_quiet: bool
) -> None:
    from nanotron_fast.cli.dry_run import dry_run
    from nanotron_fast.cli.writing import print_lines, warn

    found = dry_run(config, overrides, memory=memory)
    if _rank() > 0:
        return
    if json:
        _print_json(found.to_json())
    elif not is_quiet:
        warn(found.warnings)
        print_lines(found.lines())


def _run(config: str, overrides: list[str], *, is_quiet: bool) -> TrainingResult:
    from nanotron_fast.checkpoints.processes import Processes, TorchProcesses
    from nanotron_fast.train import Trainer, TrainingConfig
    from nanotron_fast.train.mesh import join, leave, num_processes

    is_ours = join()
    everyone = TorchProcesses() if num_processes() > 1 else Processes()
    with everyone.step():
        read = TrainingConfig.load(config, overrides)
    with ExitStack() as stack:
        bar = _TokenBar(stack, is_quiet=is_quiet or _rank() > 0)
        trainer = Trainer(read, is_quiet=is_quiet, on_tokens=bar)
        result = trainer.run()
    if is_ours:
        leave()
    return result


class _TokenBar:
    """A bar for the text that is made into tokens, which there is only where some is."""

    def __init__(self, stack: ExitStack, *, is_quiet: bool) -> None:
        from nanotron_fast.cli.reporting import Progress

        self._progress = Progress(is_quiet=is_quiet)
        self._stack = stack
        self._is_open = False
        self._show: Any = None

    def __call__(self, done: int, total: int) -> None:
        if not self._is_open:
            self._is_open = True
            self._progress.total_bytes = total
            self._show = self._stack.enter_context(self._progress.running("tokenizing"))
        if self._show is not None:
            self._show(done)
        if done >= total:
            self._stack.close()


@contextmanager
def _told_once() -> Iterator[None]:
    """Of several ranks that end for one reason, one says it."""
    from nanotron_fast.checkpoints.processes import PeerFailed, PeerGone, peer_gone
    from nanotron_fast.errors import TrainingError

    try:
        yield
    except (PeerGone, RuntimeError) as error:
        lost = error if isinstance(error, PeerGone) else peer_gone(error)
        if lost is None:
            raise
        typer.echo(f"error: rank {_rank()} ends, since {lost}", err=True)
        raise typer.Exit(EXIT_FAULT) from None
    except PeerFailed:
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except TrainingError:
        if _rank() == 0:
            raise
        raise typer.Exit(EXIT_BAD_INPUT) from None


def _tell(result: TrainingResult, *, json: bool, is_quiet: bool) -> None:
    if json:
        _print_json(result.to_json())
    elif not is_quiet:
        where = f"; {result.checkpoint} is its checkpoint" if result.checkpoint else ""
        how = f"stopped by {result.stopped_by} after" if result.stopped_by else "trained to"
        typer.echo(f"{how} step {result.step}{where}")


def _print_json(document: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(document, indent=2))
