"""Nanotron's `save_weights` and `load_weights`: the same files, read and written faster.

Loading reads what this rank needs, all parameters in one go, where Nanotron reads every shard on
every rank once the topology has changed. Saving writes several files at a time, and each of them
has its name only when it is complete.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.checkpoints.load import DTYPES, check_tensors, read_moves
from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.nanotron.checkpoint import tensor_header
from nanotron_fast.formats.safetensors import read_header
from nanotron_fast.moves.engine import default_workers
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.patch.nanotron.replacements.checkpoint_files import (
    Place,
    Unserved,
    is_replica,
    metadata_to_write,
    places,
    read_metadata,
    writes,
)
from nanotron_fast.patch.nanotron.replacements.checkpoint_moves import shard_moves, whole_move
from nanotron_fast.patch.nanotron.targets import DropInOptions

logger = logging.getLogger(__name__)

# The size of each pinned buffer that a thread copies a GPU's tensor through.
_PINNED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class FillPlan:
    """How a rank's tensors are filled, and how those of another topology were sharded there.

    `metadata` maps a parameter's name to the TensorMetadata of its shards by (pp_rank, tp_rank);
    to none where its own file was found. A tensor that has two names is filled under one.
    """

    transfer: MovePlan
    tensors: tuple[Tensor, ...]
    device: torch.device
    metadata: dict[str, dict[tuple[str, str], Any]]


def load(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`load_weights`: reads the ranges of bytes that this rank needs, and no others.

    What moves cannot do (slices with steps, tensors that are not contiguous, other dtypes than
    bf16, fp16 and fp32) is left to the original, with a warning.
    """

    def replacement(
        model: torch.nn.Module,
        parallel_context: Any,
        root_folder: Path,
        filtered_state_dict: Mapping[str, Any] | None = None,
    ) -> Any:
        started = time.perf_counter()
        tensors = model.state_dict() if filtered_state_dict is None else filtered_state_dict
        try:
            plan = plan_filling(tuple(places(model, parallel_context, root_folder, tensors)))
        except Unserved as reason:
            logger.warning("nanotron_fast: Nanotron itself loads the weights: %s", reason)
            return original(model, parallel_context, root_folder, filtered_state_dict)
        bytes_read = read_moves(plan.transfer, plan.tensors, plan.device)
        _report("loaded", len(tensors), bytes_read, started)
        return plan.metadata

    return replacement


def plan_filling(wanted: tuple[Place, ...]) -> FillPlan:
    """Reads the headers of all files that hold something of these tensors, and plans the moves.

    Raises:
        CheckpointError: a file, which is named, is missing, malformed, or does not fit the model.
        Unserved: the call is left to the original.
    """
    device = _device_of(wanted)
    own = {place.name for place in wanted if place.path.exists()}
    files = {place.name: [place.path] if place.name in own else _shards(place) for place in wanted}
    paths = list(dict.fromkeys(path for some in files.values() for path in some))
    numbers = {path: number for number, path in enumerate(paths)}
    with ThreadPoolExecutor(default_workers(), "nanotron_fast-headers") as pool:
        headers = list(pool.map(read_header, paths))

    metadata: dict[str, dict[tuple[str, str], Any]] = {place.name: {} for place in wanted}
    versions: dict[Any, Path] = {}
    moves: list[Move] = []
    # Where two names share memory, Nanotron leaves the values of the last there.
    memories = {(each.tensor.data_ptr(), each.tensor.nbytes): each for each in wanted}
    filled = list(memories.values())
    indices = {place.name: index for index, place in enumerate(filled)}
    for place in wanted:
        index = indices.get(place.name)
        if place.name in own:
            if index is not None:
                number = numbers[place.path]
                moves += whole_move(place.name, place.tensor, index, headers[number], number)
            continue
        shards = {}
        for path in files[place.name]:
            ranks, shard = read_metadata(headers[numbers[path]])
            versions.setdefault(shard.version, path)
            metadata[place.name][ranks] = shard
            shards[path] = (numbers[path], headers[numbers[path]], shard)
        if index is not None:
            pairs = place.sharded.local_global_slices_pairs
            moves += shard_moves(place.name, place.tensor, index, pairs, shards)
    if len(versions) > 1:
        found = "; ".join(f"{path} is {version}" for version, path in versions.items())
        raise CheckpointError(f"files of several checkpoint versions are mixed: {found}")
    if len(own) < len(wanted) and torch.get_default_dtype() is not torch.float32:
        raise Unserved(f"shards are merged in {torch.get_default_dtype()}")
    outputs = tuple(OutputFile(place.name, b"", place.tensor.nbytes) for place in filled)
    transfer = MovePlan(tuple(paths), outputs, tuple(moves))
    transfer.check()
    return FillPlan(transfer, tuple(place.tensor for place in filled), device, metadata)


def _device_of(wanted: Iterable[Place]) -> torch.device:
    """Raises Unserved for tensors that cannot be read into."""
    try:
        return check_tensors({place.name: place.tensor for place in wanted})
    except ValueError as error:
        raise Unserved(str(error)) from error


def _shards(place: Place) -> list[Path]:
    """The shards of a parameter whose own file is not there. Raises CheckpointError for none."""
    path = place.path
    if not path.parent.exists():
        raise CheckpointError(
            f"{place.name}: there is no folder {path.parent}: the checkpoint is empty, or of "
            "another model"
        )
    if place.sharded is None:
        raise CheckpointError(f"{place.name}: {path} is not there, and it is not sharded")
    shards = place.other_shards()
    if not shards:
        raise CheckpointError(f"{place.name}: neither {path} is there, nor another shard of it")
    return shards


@dataclass(frozen=True, slots=True)
class File:
    """A file to be written. It is called `partial` until it is complete."""

    path: Path
    partial: Path
    tensor: Tensor
    metadata: dict[str, str]


def save(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`save_weights`: several files at a time, each of them whole or not there.

    What moves cannot do (see `load`) is left to the original, with a warning.
    """

    def replacement(model: torch.nn.Module, parallel_context: Any, root_folder: Path) -> Any:
        started = time.perf_counter()
        if is_replica(parallel_context):
            return None
        wanted = [
            place
            for place in places(model, parallel_context, root_folder, model.state_dict())
            if writes(place, parallel_context)
        ]
        try:
            files = list(_files(wanted))
        except Unserved as reason:
            logger.warning("nanotron_fast: Nanotron itself saves the weights: %s", reason)
            return original(model, parallel_context, root_folder)
        _report("saved", len(files), write_files(files), started)
        return None

    return replacement


def _files(wanted: list[Place]) -> Iterator[File]:
    """The files to be written. Where two names share a file, the last is written, as by Nanotron.

    Raises Unserved where Nanotron itself has to write them.
    """
    _device_of(wanted)
    for place in {place.path: place for place in wanted}.values():
        path = place.path
        if hasattr(place.parameter, "_no_weight_decay"):
            raise Unserved(f"the released Nanotron saves _no_weight_decay with {place.name}")
        # The rank is in the name, because on a shared disk the processes of several machines may
        # have the same number.
        partial = path.with_name(f".{path.name}.rank-{place.owner}.partial")
        yield File(path, partial, place.tensor, metadata_to_write(place))


def write_files(files: list[File]) -> int:
    """Writes files, the largest first, and returns their bytes without headers.

    Raises OSError. After an error no file is half-written: those that were complete are there.
    """
    for folder in {file.path.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
    for device in {file.tensor.device for file in files if file.tensor.is_cuda}:
        # The threads copy on streams of their own.
        torch.cuda.current_stream(device).synchronize()
    files = sorted(files, key=lambda file: -file.tensor.nbytes)
    with ThreadPoolExecutor(default_workers(), "nanotron_fast-save") as pool:
        pending = [pool.submit(_write, file) for file in files]
        try:
            for each in as_completed(pending):
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sum(file.tensor.nbytes for file in files)


def _write(file: File) -> None:
    tensor = file.tensor.detach()
    header, _ = tensor_header(DTYPES[tensor.dtype], tuple(tensor.shape), file.metadata)
    try:
        with open(file.partial, "wb") as output:
            output.write(header)
            for part in _on_host(tensor.reshape(-1).view(torch.uint8)):
                output.write(part.numpy().data)
        os.replace(file.partial, file.path)
    except BaseException as error:
        file.partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a write to a full disk
            raise OSError(error.errno, error.strerror, str(file.path)) from error
        raise


def _on_host(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor in parts, each of which is valid until the next is asked for."""
    if not tensor.is_cuda:
        yield tensor
        return
    stream = torch.cuda.Stream(tensor.device)
    with torch.cuda.device(tensor.device):
        size = min(tensor.numel(), _PINNED_BYTES)
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for part in tensor.split(_PINNED_BYTES):
        with torch.cuda.stream(stream):
            pinned[: part.numel()].copy_(part, non_blocking=True)
        stream.synchronize()
        yield pinned[: part.numel()]


def _report(done: str, num_tensors: int, num_bytes: int, started: float) -> None:
    seconds = time.perf_counter() - started
    logger.info(
        "nanotron_fast: %s %d tensors, %.2f GB in %.2f s (%.2f GB/s)",
        done,
        num_tensors,
        num_bytes / 1e9,
        seconds,
        num_bytes / 1e9 / seconds,
    )
