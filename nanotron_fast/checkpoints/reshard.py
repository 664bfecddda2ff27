"""Resharding a checkpoint of training: weights and states, from any topology to any other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nanotron_fast.checkpoints.carrying_out import Report, carry_out
from nanotron_fast.checkpoints.collection import keeping_objects
from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.ownership import LITTER_SECONDS
from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.plan.reshard import Training, plan_reshard
from nanotron_fast.checkpoints.processes import Processes
from nanotron_fast.checkpoints.remote.urls import DESTINATION, as_path, is_url, without_password
from nanotron_fast.checkpoints.settling import Wishes
from nanotron_fast.checkpoints.small_files import write_file
from nanotron_fast.checkpoints.source import resolve
from nanotron_fast.errors import CheckpointError, ConfigError, add_note
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron.checkpoint import (
    LATEST,
    METADATA,
    is_nanotron_checkpoint,
    read_nanotron,
)
from nanotron_fast.formats.nanotron.optimizer import MAX_RANKS
from nanotron_fast.formats.plain_file import noting, read_small
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.engine import ProgressCallback


def plan(
    src: str | Path,
    dst: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    ep: int | None = None,
    zero_stage: int | None = None,
) -> Plan:
    """Plans to write the checkpoint `src` to `dst` at another topology; writes nothing.

    Args:
        src: a Nanotron checkpoint, of a training or of weights alone; a run's folder means its
            latest.
        dst: the folder that `reshard` would write.
        tp, pp: tensor-parallel ranks and pipeline stages; by default those of `src`.
        dp: data-parallel ranks, by default those of `src`.
        ep: ranks that experts are split over, in this package's own class alone.
        zero_stage: 0, or 1 to share the optimizer's states out over data-parallel ranks; by default
            as in `src`.

    Raises:
        CheckpointError, ConfigError, TopologyError, UnsupportedModelError: all ValueError, each
            naming the file, tensor or option and the numbers.
        OSError: a file cannot be read.
    """
    dst = _folder(dst)
    if dp is not None and (not isinstance(dp, int) or not 1 <= dp <= MAX_RANKS):
        raise ConfigError(f"--dp {dp!r}: a group has at least one rank, and at most {MAX_RANKS}")
    if zero_stage not in (None, 0, 1):
        raise ConfigError(f"--zero-stage {zero_stage!r}: choose 0 or 1")
    with noting() as noted:
        ready = _plan(src, dst, Training(dp, zero_stage), tp=tp, pp=pp, ep=ep)
    return replace(ready, sources_read={**noted, **ready.sources_read})


def _plan(
    src: str | Path,
    dst: str | Path,
    training: Training,
    *,
    tp: int | None,
    pp: int | None,
    ep: int | None,
) -> Plan:
    root = resolve(src)
    if not is_nanotron_checkpoint(root):
        raise CheckpointError(
            f"{root}: it is not a Nanotron checkpoint, and others have no topology: use convert"
        )
    source = read_nanotron(root)
    topology = Topology(
        tp=source.tp if tp is None else tp,
        pp=source.pp if pp is None else pp,
        ep=source.ep if ep is None else ep,
    )
    options = Options(topology=topology)
    with keeping_objects():
        return plan_reshard(source, Path(os.path.realpath(dst)), options, training)


def reshard(
    src: str | Path,
    dst: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    ep: int | None = None,
    zero_stage: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    fsync: bool = False,
    resume: bool = False,
    overwrite_partial: bool = False,
    io: str = "auto",
    manifest: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    on_total: Callable[[int], None] | None = None,
    on_progress: ProgressCallback | None = None,
    processes: Processes | None = None,
) -> Report:
    """Writes the checkpoint `src` to `dst` at another topology, the states of training included.

    `dst` appears when it is whole. Where it is named by its step, as the folders of a run are,
    `latest.txt` beside it then names it, unless that names a later step.

    Args:
        src, dst, tp, pp, dp, ep, zero_stage: as for `plan`.
        overwrite, workers, fsync, resume, overwrite_partial, io, manifest, on_plan, on_total,
            on_progress, processes: as for `convert`.

    Raises:
        What `plan` raises; DestinationError (an OSError) where `dst` is in the way or the disk too
        small; OSError.
    """
    dst = _folder(dst)
    processes = processes or Processes()
    report = carry_out(
        lambda: plan(src, dst, tp=tp, pp=pp, dp=dp, ep=ep, zero_stage=zero_stage),
        dst,
        overwrite=overwrite,
        workers=workers,
        fsync=fsync,
        wishes=Wishes(resume, overwrite_partial),
        io=io,
        manifest=manifest,
        on_plan=on_plan,
        on_total=on_total,
        on_progress=on_progress,
        processes=processes,
    )
    with processes.step():
        if processes.rank == 0 and report.plan.states is not None:
            folder = Path(report.destination)
            try:
                _name_latest(folder, fsync=fsync)
            except OSError as error:
                add_note(error, f"{folder} is whole, and {LATEST} beside it does not name it")
                raise
    return report


def _folder(dst: str | Path) -> str | Path:
    if is_url(dst) and is_url(as_path(dst, DESTINATION)):
        shown = without_password(str(dst))
        raise ConfigError(f"{shown}: a training checkpoint is written to a directory alone")
    return as_path(dst, DESTINATION)


def _name_latest(folder: Path, *, fsync: bool) -> None:
    """Lets `latest.txt` beside a step's folder name it, unless it names a later one."""
    metas = read_json_object(folder / METADATA).get("metas")
    step = metas.get("last_train_step") if isinstance(metas, dict) else None
    if folder.name != str(step):
        return
    latest = folder.parent / LATEST
    if latest.is_file():
        named = read_small(latest).decode("utf-8", errors="replace").strip()
        is_later = named.isdecimal() and len(named) < 20 and int(named) > int(folder.name)
        if is_later and (folder.parent / named).is_dir():
            return
    partial = folder.parent / f".{LATEST}.partial-{os.getpid()}"
    try:
        write_file(partial, folder.name.encode(), fsync=fsync)
        partial.rename(latest)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # Those of runs that were killed before their rename.
    now = latest.stat().st_mtime
    for left in folder.parent.glob(f".{LATEST}.partial-*"):
        with contextlib.suppress(OSError):  # it is in nobody's way
            if now - left.stat().st_mtime >= LITTER_SECONDS:
                left.unlink()
