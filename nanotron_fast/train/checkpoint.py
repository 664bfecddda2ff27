"""Writing a checkpoint of a run: whole, or not there.

All ranks write into a folder beside the place where the checkpoint will be. When every file is
there, the first rank adds the small files, the metadata last of them, gives the folder its name,
and then lets `latest.txt` name it. A rank that fails ends the save on all of them, and leaves the
last checkpoint as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanotron_fast.checkpoints.convert import convert
from nanotron_fast.checkpoints.load import DTYPES
from nanotron_fast.checkpoints.partial import new_run
from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.processes import Processes
from nanotron_fast.checkpoints.renaming import exchange
from nanotron_fast.checkpoints.small_files import sync, write_file
from nanotron_fast.formats.nanotron.checkpoint import (
    LATEST,
    METADATA,
    OPTIMIZER,
    tensor_header,
    tensor_path,
)
from nanotron_fast.formats.nanotron.optimizer import (
    OPTIMIZER_CONFIG,
    Described,
    Sizes,
    config_document,
    lr_scheduler_path,
    optimizer_path,
)
from nanotron_fast.formats.nanotron.slices import shard_metadata
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer import AdamW, Rate
from nanotron_fast.train.optimizer_files import (
    lr_scheduler_document,
    optimizer_document,
    place_of,
    sizes_of,
)
from nanotron_fast.train.parameters import Trained
from nanotron_fast.train.zero import resolve_group

VERSION = "1.5"
# The folder of a checkpoint that transformers loads.
HF = "hf"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a rank writes, in memory of the CPU: training may go on while it is written.

    Args:
        tensors: the path of each weight's file, its header, its values.
        documents: what torch.save writes, by path.
        small_files: contents by path.
    """

    tensors: list[tuple[str, bytes, Tensor]] = field(default_factory=list)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    small_files: dict[str, bytes] = field(default_factory=dict)


def snapshot(
    trained: Sequence[Trained],
    frozen: Sequence[Trained],
    optimizer: AdamW,
    mesh: Mesh,
    rate: Rate,
    *,
    zero_stage: int,
) -> Snapshot:
    """Copies what this rank has to write. Every rank calls it.

    Args:
        trained: all parameters of this rank that steps move, and `frozen` the others.
        rate: the learning rate of the next step, from a parameter's highest one.
    """
    taken = Snapshot()
    for each in (*trained, *frozen):
        found = _weight(each, mesh)
        if found is not None:
            taken.tensors.append(found)
    sizes, place = sizes_of(mesh, zero_stage=zero_stage), place_of(mesh, zero_stage=zero_stage)
    # Of the ranks that have the same, experts included, the first writes what they have.
    is_first = mesh.edp_rank == 0
    if is_first:
        taken.documents[lr_scheduler_path(place, sizes)] = lr_scheduler_document(
            optimizer, rate, mesh, zero_stage=zero_stage
        )
    if zero_stage > 0 or is_first:
        document = optimizer_document(optimizer, rate, mesh, zero_stage=zero_stage)
        taken.documents[optimizer_path(place, sizes)] = document
    everywhere = _of_all_stages(trained, mesh, sizes)
    if mesh.rank == 0:
        config = config_document(everywhere, sizes)
        taken.small_files[f"{OPTIMIZER}/{OPTIMIZER_CONFIG}"] = json.dumps(config).encode()
    return taken


def _weight(each: Trained, mesh: Mesh) -> tuple[str, bytes, Tensor] | None:
    """A parameter's file, where this rank is the one that writes it."""
    param = each.facts.param
    sizes = {"tp": mesh.tp, "ep": mesh.ep}
    # One axis cuts it, or none.
    axis = next(iter(param.cuts_at(sizes)), None)
    is_copy = each.name != each.facts.name
    if is_copy or (axis != "tp" and mesh.tp_rank > 0):
        return None
    if not each.is_by_rows and each.replicas.rank > 0:
        return None
    whole = each.values()
    if each.replicas.rank > 0:
        return None
    metadata: Mapping[str, str] = {}
    shard = expert = None
    if axis is not None:
        shard = (mesh.pp_rank, mesh.pp, mesh.tp_rank, mesh.tp)
        expert = (mesh.ep_rank, mesh.ep) if axis == "ep" else None
        metadata = shard_metadata(
            param.shape,
            split=param.cuts[axis],
            chunks=param.chunks,
            tp=sizes[axis],
            rank=mesh.ep_rank if axis == "ep" else mesh.tp_rank,
            version=VERSION,
            heads=param.heads,
        )
    values = whole.to("cpu", copy=not each.is_by_rows)
    header, _ = tensor_header(DTYPES[values.dtype], tuple(values.shape), metadata)
    return tensor_path(each.name, shard, expert), header, values


def _of_all_stages(trained: Sequence[Trained], mesh: Mesh, sizes: Sizes) -> list[Described]:
    """The parameters of all pipeline stages, each once, with every data-parallel rank's runs."""
    mine = []
    for each in trained:
        ranks_each = sizes.ep if each.is_of_experts else 1
        runs = tuple(each.stored_runs[rank // ranks_each] for rank in range(sizes.dp))
        mine.append(Described(each.name, runs, tuple(each.tensor.shape)))
    if mesh.pp_group is None:
        return mine
    gathered: list[list[Described]] = [[] for _ in range(mesh.pp)]
    dist.all_gather_object(gathered, mine, group=resolve_group(mesh.pp_group))
    return list({each.name: each for stage in gathered for each in stage}.values())


def metadata_document(
    mesh: Mesh, *, step: int, stages: Sequence[Mapping[str, Any]], last_stage: int
) -> dict[str, Any]:
    """`checkpoint_metadata.json` of a run.

    Args:
        step: the last that was taken.
        stages: of the data that was used: `name`, `sequence_length`, `start_training_step`,
            `consumed_train_samples`, `consumed_tokens_per_dataset_folder`. By Nanotron's rule the
            tokens that were consumed are the sums of the last of these, and samples those of the
            stages.
        last_stage: index of the one that is in use.
    """
    tokens = sum(sum(s["consumed_tokens_per_dataset_folder"].values()) for s in stages)
    return {
        "cp": 1,
        "custom_metas": None,
        "dp": mesh.dp,
        "metas": {
            "consumed_tokens_total": tokens,
            "consumed_train_samples": sum(stage["consumed_train_samples"] for stage in stages),
            "data_stages": [dict(stage) for stage in stages],
            "last_stage_idx": last_stage,
            "last_train_step": step,
        },
        "tp": mesh.tp,
        "version": VERSION,
    }


@dataclass(frozen=True, slots=True)
class Beside:
    """What lies beside the weights of every checkpoint of a run.

    Args:
        documents: contents by name: the configurations, a tokenizer's files. The first rank writes
            them, and others need not have them.
        exports_hf: a Hugging Face folder `hf/` as well, on which all ranks work.
    """

    documents: Mapping[str, bytes] = field(default_factory=dict)
    exports_hf: bool = False


def save(
    root: Path,
    step: int,
    taken: Snapshot,
    processes: Processes,
    *,
    beside: Beside,
    metadata: Mapping[str, Any],
    fsync: bool = True,
    warn: Callable[[str], None] | None = None,
    check: Callable[[], None] | None = None,
) -> Path:
    """Writes the checkpoint of a step; every rank calls it, and returns when it is whole.

    Args:
        root: the folder of the run, which all ranks see.
        taken: of this rank.
        processes: the ranks.
        metadata: what `metadata_document` gives, from the first rank.
        fsync: return when the disk has it.
        warn: is told what the Hugging Face folder lacks.
        check: called by the first rank just before others may see the checkpoint; may raise.

    Returns:
        Its folder.

    Raises:
        OSError: a file cannot be written. PeerFailed: on another rank; it has said why.
    """
    # A name of its own: a rank that is cut off from the others may be writing to an earlier one.
    (run, *_) = processes.gather(new_run())
    partial, hf = root / f".{step}.{run}.partial", root / f".{step}.{run}.{HF}"
    try:
        with processes.step():
            if processes.rank == 0:
                partial.mkdir(parents=True)
        with processes.step():
            write(partial, taken, fsync=fsync)
            if processes.rank == 0:
                for name, contents in beside.documents.items():
                    write_file(_made(partial, name), contents, fsync=fsync)
        if beside.exports_hf:
            _export(partial, hf, processes, fsync=fsync, warn=warn)
        with processes.step():
            if processes.rank == 0:
                if beside.exports_hf:
                    hf.rename(partial / HF)
                text = json.dumps(metadata, indent=2, sort_keys=True)
                write_file(partial / METADATA, text.encode(), fsync=fsync)
                if check is not None:
                    check()
                publish(root, partial, step, fsync=fsync)
    except BaseException:
        # No rank writes any more. What cannot be removed either is left to the next run.
        if processes.rank == 0:
            for left in (partial, *root.glob(f"{hf.name}*")):
                shutil.rmtree(left, ignore_errors=True)
        raise
    return root / str(step)


def clear(root: Path) -> None:
    """Removes what killed runs have left. Raises OSError."""
    for left in (*root.glob(".*.partial"), *root.glob(f".*.{HF}*")):
        _remove(left)


def prove_writable(root: Path) -> None:
    """Makes and removes in a run's folder what a save would.

    Raises OSError, which names what it was about.
    """
    proof = root / ".proof.partial"
    try:
        proof.mkdir(exist_ok=True)
        write_file(proof / METADATA, b"{}", fsync=False)
    except OSError:
        shutil.rmtree(proof, ignore_errors=True)
        raise
    _remove(proof)


def _export(
    partial: Path,
    destination: Path,
    processes: Processes,
    *,
    fsync: bool,
    warn: Callable[[str], None] | None,
) -> None:
    """The same weights as a Hugging Face folder; all ranks share the work."""

    def on_plan(plan: Plan) -> None:
        if warn is not None:
            for warning in plan.warnings:
                # The folder has a name of its own in each save, and the option is a conversion's.
                told = warning.replace(str(partial), "the checkpoint")
                told = told.replace("--tokenizer DIR_OR_ID", "tokenizer.tokenizer_name_or_path")
                warn(f"{HF}: {told}")

    convert(
        partial,
        destination,
        to="hf",
        fsync=fsync,
        overwrite_partial=True,
        on_plan=on_plan,
        processes=processes,
    )


def write(folder: Path, taken: Snapshot, *, fsync: bool) -> None:
    """Writes a rank's files. Raises OSError, which names the file."""
    for name, header, values in taken.tensors:
        _write_tensor(_made(folder, name), header, values, fsync=fsync)
    for name, document in taken.documents.items():
        _write_document(_made(folder, name), document, fsync=fsync)
    for name, contents in taken.small_files.items():
        write_file(_made(folder, name), contents, fsync=fsync)


def _made(folder: Path, name: str) -> Path:
    """A file's path within a folder, once the folders between are made.

    The folder itself is not: where it is gone, so is what other files it had.
    """
    between = list(Path(name).parents)[:-1]
    for each in reversed(between):
        (folder / each).mkdir(exist_ok=True)
    return folder / name


class _Writer:
    """A file that remembers what went wrong: torch.save makes another error of it."""

    def __init__(self, path: Path, *, fsync: bool) -> None:
        self._path, self._fsync = path, fsync
        self._error: OSError | None = None

    def __enter__(self) -> _Writer:
        self._file = open(self._path, "wb", buffering=0)
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        try:
            if error is None and self._fsync:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        if self._error is not None and error is not self._error:
            raise self._error from None

    def write(self, contents: Any) -> int:
        view = memoryview(contents).cast("B")
        left = view
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            error.filename = error.filename or os.fspath(self._path)
            self._error = error
            raise
        return len(view)

    def flush(self) -> None:
        """Nothing is kept back."""


def _write_document(path: Path, document: dict[str, Any], *, fsync: bool) -> None:
    with _Writer(path, fsync=fsync) as file:
        torch.save(document, file)


def _write_tensor(path: Path, header: bytes, values: Tensor, *, fsync: bool) -> None:
    with _Writer(path, fsync=fsync) as file:
        file.write(header)
        if values.numel():
            file.write(values.contiguous().view(-1).view(torch.uint8).numpy())


def publish(root: Path, partial: Path, step: int, *, fsync: bool) -> None:
    """Gives a checkpoint that is whole its name, and lets `latest.txt` name it.

    One of the same step that was there changes its name with it, and is removed at the end.
    """
    final = root / str(step)
    if fsync:
        for folder, _, _ in os.walk(partial):
            sync(Path(folder))
    if final.exists():
        _replace(partial, final)
    else:
        partial.rename(final)
    if fsync:
        sync(root)
    latest = root / f".{LATEST}.partial"
    write_file(latest, str(step).encode(), fsync=fsync)
    latest.replace(root / LATEST)
    if fsync:
        sync(root)
    _remove(partial)


def _remove(path: Path) -> None:
    """Removes a file or a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(one: Path, other: Path) -> None:
    """Two folders change their names; the other may have none for a moment. Raises OSError."""
    if exchange(one, other):
        return
    aside = one.with_name(f".{other.name}.replaced.partial")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)
