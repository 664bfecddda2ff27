"""Converting a checkpoint from one format to the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanotron_fast.checkpoints.carrying_out import Report, carry_out
from nanotron_fast.checkpoints.collection import keeping_objects
from nanotron_fast.checkpoints.options import Choices, Options, reject_like, takes
from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.processes import Processes
from nanotron_fast.checkpoints.remote.mirror import (
    mirror_of,
    mirrors_closed,
    shown,
    shown_in_errors,
)
from nanotron_fast.checkpoints.remote.packages import require_store
from nanotron_fast.checkpoints.remote.urls import DESTINATION, as_path, is_url, without_password
from nanotron_fast.checkpoints.settling import Wishes
from nanotron_fast.checkpoints.source import read, resolve, tensor_names
from nanotron_fast.errors import CheckpointError, ConfigError
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint
from nanotron_fast.formats.patterns import unmatched
from nanotron_fast.formats.plain_file import noting
from nanotron_fast.moves.engine import ProgressCallback

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(Choices)
@keeping_objects()
@shown_in_errors()
def plan(
    src: str | Path,
    dst: str | Path,
    **choices: Unpack[Choices],
) -> Plan:
    """Plans the conversion of `src` to `dst` from headers alone; writes nothing.

    Args:
        src: a directory, the id of a model on the Hugging Face Hub, or a URL such as
            `hf://org/model@revision` or `s3://bucket/folder`, whose tensors are read by ranges.
        dst: the directory that `convert` would write, or a URL.
        choices: the options at the end, each a field of `checkpoints.options.Options`.

    Raises:
        CheckpointError, ConfigError, TopologyError, UnsupportedModelError: all ValueError, each
            naming the file, tensor or option and the numbers.
        MissingPackageError: what reads from a store is not installed.
        OSError: a file cannot be read.
    """
    require_store(src, dst)
    options = Options.of(choices)
    dst = as_path(dst, DESTINATION)
    with noting() as noted:
        ready = _plan(src, dst, options)
    return replace(ready, sources_read={**noted, **ready.sources_read})


def _plan(src: str | Path, dst: str | Path, options: Options) -> Plan:
    # What a direction does not need is not even imported: it counts in the time to start.
    whole = read(resolve(src, takes_urls=True), like=options.like)
    if options.master_weights and mirror_of(whole.root) is not None:
        raise CheckpointError(
            f"{src}: the states of an optimizer are read from a disk alone: copy it to one"
        )
    warnings = unmatched(tensor_names(whole), options.ignore_tensors)
    checkpoint = whole.without(options.ignore_tensors)
    destination = _absolute(dst)
    if isinstance(checkpoint, HfCheckpoint):
        ready = _plan_published(checkpoint, destination, options)
    elif options.to == "nanotron":
        from nanotron_fast.checkpoints.plan.reshard import plan_reshard

        ready = plan_reshard(checkpoint, destination, options)
    else:
        from nanotron_fast.checkpoints.plan.to_hf import plan_to_hf

        ready = plan_to_hf(checkpoint, options)
    warnings = list(map(shown, (*ready.warnings, *warnings)))
    return replace(
        ready,
        warnings=tuple(warnings),
        sources_read={**checkpoint.read, **ready.sources_read},
    )


def _absolute(dst: str | Path) -> str:
    """What config.yaml calls the destination."""
    return without_password(str(dst)) if is_url(dst) else os.path.realpath(dst)


def _plan_published(source: HfCheckpoint, destination: str, options: Options) -> Plan:
    """Plans from a model as it is published. Raises what `plan` does."""
    if source.format == "hf":
        if options.to == "hf":
            raise ConfigError(f"--to hf: {source.root} is a Hugging Face checkpoint already")
        reject_like(options)
    if options.to in (None, "nanotron"):
        from nanotron_fast.checkpoints.plan.to_nanotron import plan_to_nanotron

        return plan_to_nanotron(source, destination, options)
    from nanotron_fast.checkpoints.plan.renaming import plan_renaming

    return plan_renaming(source, options)


@takes(Choices)
@mirrors_closed()
def convert(
    src: str | Path,
    dst: str | Path,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    fsync: bool = False,
    resume: bool = False,
    overwrite_partial: bool = False,
    share: tuple[int, int] | None = None,
    finish: bool = False,
    io: str = "auto",
    manifest: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    on_total: Callable[[int], None] | None = None,
    on_progress: ProgressCallback | None = None,
    processes: Processes | None = None,
    **choices: Unpack[Choices],
) -> Report:
    """Converts `src` to `dst`: to Nanotron or from it, by what `src` is.

    `dst` appears when it is whole. On an error, and when interrupted, it is as it was before, and
    the files that were whole by then stay in `dst`.partial-ID, for a run with `resume`.

    Args:
        src, dst, choices: as for `plan`.
        overwrite: replace a `dst` that is not empty, once the new one is whole.
        workers: threads; by default one for each core, 16 at most.
        fsync: return only when files, directories and the rename are on the device.
        resume: go on with what an earlier run of the same conversion has finished; without one,
            begin. What is of another conversion, or of a source that has changed, is an error.
        overwrite_partial: give up what earlier runs have finished; with `resume`, only what it
            cannot go on with.
        share: (I, N): do the I-th of N shares, each of which may run anywhere, at any time.
        finish: prove that all shares are done, and give the result its name.
        io: how bytes pass between files and memory: "buffered", through the page cache; "direct",
            past it; "dontcache", through it without staying there; "auto" chooses.
        manifest: write the SHA-256 of every tensor beside them, for `check_manifest`.
        on_plan: called with the Plan before anything is written.
        on_total: called with the bytes that this process is about to write.
        on_progress: called now and then with the bytes written so far.
        processes: shares the work with those of torchrun (see `checkpoints.processes`).

    Raises:
        What `plan` raises; DestinationError (an OSError) where `dst` is in the way or the disk
        too small; OSError.
    """
    return carry_out(
        lambda: plan(src, dst, **choices),
        dst,
        overwrite=overwrite,
        workers=workers,
        fsync=fsync,
        wishes=Wishes(resume, overwrite_partial, share, finish),
        io=io,
        manifest=manifest,
        on_plan=on_plan,
        on_total=on_total,
        on_progress=on_progress,
        processes=processes,
    )
