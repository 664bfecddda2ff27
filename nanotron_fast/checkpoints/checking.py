"""What must hold while a plan is carried out: the same for all processes, and of the source."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

from nanotron_fast.checkpoints.fingerprint import Made
from nanotron_fast.checkpoints.owners import boot_id
from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.processes import Processes
from nanotron_fast.checkpoints.remote import running
from nanotron_fast.checkpoints.remote.mirror import mirror_of
from nanotron_fast.checkpoints.remote.store import at_once
from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.plain_file import changed, digest_whole
from nanotron_fast.moves.files import FileState, ReadFile


def check_same(processes: Processes, made: Made) -> Collection[str]:
    """Proves that all processes have made the same plan, and returns the boots of their machines.

    Raises CheckpointError, which names the first thing in which they differ.
    """
    said = processes.gather((made.digest, boot_id()))
    rank = next((rank for rank, (digest, _) in enumerate(said) if digest != said[0][0]), None)
    if rank is not None:
        all_made = processes.gather(made)
        mine, others = "in process 0", f"in process {rank}"
        difference = all_made[0].difference(all_made[rank], mine=mine, others=others)
        raise CheckpointError(
            f"the processes do not see the same: {difference}. A file system may be mounted on one "
            "machine alone, or show an older state there"
        )
    return {boot for _, boot in said}


def check_unchanged(states: Mapping[Path, ReadFile]) -> None:
    """Raises CheckpointError where a source is not any more what it was; OSError.

    A small file that was written anew with the same contents is what it was. Files of tensors in a
    store are compared when they are read.
    """
    in_stores: list[Callable[[], int]] = []
    for path, read in states.items():
        mirrored = mirror_of(path)
        if mirrored is not None and read.is_whole:
            mirror, name = mirrored
            in_stores.append(partial(mirror.check_whole, name))
            continue
        try:
            found = FileState.of(os.stat(path))
            is_same = found == read.state or (
                read.is_whole and digest_whole(path).header_digest == read.header_digest
            )
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: it has been removed while it was read: what was written may be a "
                "mixture, and is given up"
            ) from None
        if not is_same:
            raise changed(path, read.state.size_bytes, found.size_bytes)
    at_once(in_stores)


def check_source(ready: Plan, workers: int) -> None:
    """Compares what the source holds twice. Raises CheckpointError where it differs."""
    if ready.check_source is not None:
        ready.check_source()
    if not ready.must_be_equal:
        return
    paths, pairs = ready.transfer.sources, ready.must_be_equal
    moves = [pair.named.move for pair in pairs]
    for index, count, _ in running.compare(paths, paths, moves, workers=workers):
        pair, move = pairs[index], moves[index]
        raise CheckpointError(
            f"{paths[move.destination]}: {pair.differ} in {count} of {move.num_elements} elements. "
            f"{pair.advice}"
        )
