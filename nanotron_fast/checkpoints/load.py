"""Filling one rank's tensors straight from a checkpoint, in either format and at any topology."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanotron_fast import _C
from nanotron_fast.checkpoints.options import LoadChoices, Options, reject_like, takes
from nanotron_fast.checkpoints.plan.load import TensorSpec, plan_load
from nanotron_fast.checkpoints.source import read, resolve
from nanotron_fast.errors import ConfigError
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint, check_rival_bytes
from nanotron_fast.kernels import pack
from nanotron_fast.model.topology import Topology, topology_wanted
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.engine import ProgressCallback, default_workers
from nanotron_fast.moves.move import scales_of, table_of
from nanotron_fast.moves.plan import MovePlan
from nanotron_fast.moves.staging import batches_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

# What tensors may be of, in torch's words.
DTYPES = {getattr(torch, dtype.torch_name): dtype for dtype in Dtype}
# Bytes of each of the two staging buffers. On a CPU they should stay in its last cache.
_STAGING_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did. `bytes_read` leaves out headers: it is what the rank's tensors need."""

    bytes_read: int
    seconds: float
    num_tensors: int
    warnings: tuple[str, ...] = ()

    @property
    def gigabytes_per_second(self) -> float:
        """Decimal gigabytes read, over the whole time."""
        return self.bytes_read / 1e9 / self.seconds if self.seconds else 0.0


@takes(LoadChoices)
def load_into(
    tensors: Mapping[str, torch.Tensor] | torch.nn.Module,
    path: str | Path,
    *,
    topology: Topology,
    rank: int,
    blocks: Collection[int | str] | None = None,
    device: torch.device | str | None = None,
    stored_rope_interleaved: bool | None = None,
    workers: int | None = None,
    staging_bytes: int | None = None,
    on_progress: ProgressCallback | None = None,
    **choices: Unpack[LoadChoices],
) -> LoadReport:
    """Fills the tensors of one rank from a checkpoint, reading only the bytes that it needs.

    The checkpoint is Hugging Face's, or Nanotron's at any topology. Bytes are read into two staging
    buffers, pinned for a GPU, and packed, cast and sharded on the device by `kernels.pack.run`.
    What needs neither, on a CPU, is read to where it belongs. Values are cast to each tensor's own
    dtype. Nothing is read before names and shapes of all tensors and of the whole checkpoint fit.

    Args:
        tensors: Nanotron's parameter names, such as model.decoder.0.pp_block.attn.qkv_proj.weight,
            and this rank's shards, contiguous, in bf16, fp16 or fp32; or a module whose
            `named_parameters` are that. Exactly those that the rank owns: layers by Nanotron's own
            assignment to stages. A tied head is filled on its own stage; on the embedding's it may
            be there, as the same tensor or one of its own. Written in place; not differentiable.
        path: a directory, or the id of a model on the Hugging Face Hub.
        topology: of the ranks that are loading.
        rank: in the grid of ranks, tp fastest: (ep_rank * pp + pp_rank) * tp + tp_rank.
        blocks: whose tensors they are, where Nanotron's assignment does not say it: numbers of
            layers, "embedding", "norm", "head". Of `rank` the place in the tp group counts then.
        device: where the tensors are said to be; by default where they are.
        stored_rope_interleaved: how the rows of q and k lie in a Nanotron checkpoint, whatever its
            configuration says. A Llama's that says nothing is taken for interleaved, with a
            warning. `rope_interleaved` is how they shall lie in `tensors`: by default as a Nanotron
            checkpoint has them, and in halves from Hugging Face.
        workers: threads that read; by default one for each core, 16 at most.
        staging_bytes: of each buffer; by default 256 MiB for a GPU, and 32 MiB on a CPU.
        on_progress: called now and then with the bytes read so far.
        choices: the options at the end, each a field of `checkpoints.options.Options`.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: as `plan`. Whether the copy of a tied
            matrix that some files hold is equal is left to `convert` and `verify`.
        TypeError: `tensors` or `topology` is something else: the message says what is wanted.
        TopologyError: tensors are missing, unknown, or of another shape; all of them are named.
        ValueError: a tensor has another dtype or device, or is not contiguous.
        OSError: a file cannot be read.
    """
    started = time.perf_counter()
    if workers is not None and workers < 1:
        raise ConfigError(f"workers {workers}: it should be at least 1")
    if staging_bytes is not None and staging_bytes < 4096:
        raise ConfigError(f"staging_bytes {staging_bytes}: it should be at least 4096")
    _check_arguments(tensors, topology, rank)
    named = dict(tensors.named_parameters() if isinstance(tensors, torch.nn.Module) else tensors)
    where = check_tensors(named, None if device is None else torch.device(device))
    wanted = Options.of(choices, LoadChoices)
    options = replace(wanted, topology=topology, rope_interleaved=stored_rope_interleaved)
    specs = {
        name: TensorSpec(tuple(tensor.shape), DTYPES[tensor.dtype], tensor.data_ptr())
        for name, tensor in named.items()
    }
    checkpoint = read(resolve(path), like=options.like).without(options.ignore_tensors)
    if isinstance(checkpoint, HfCheckpoint):
        if checkpoint.format == "hf":
            reject_like(wanted)
        check_rival_bytes(checkpoint)
    plan = plan_load(
        checkpoint,
        specs,
        rank,
        options,
        rope_interleaved=wanted.rope_interleaved,
        blocks=blocks,
    )
    for warning in plan.warnings:
        warnings.warn(f"{path}: {warning}", stacklevel=3)  # past what checks keywords
    bytes_read = read_moves(
        plan.transfer,
        [named[name] for name in plan.names],
        where,
        workers=workers,
        staging_bytes=staging_bytes,
        on_progress=on_progress,
    )
    seconds = time.perf_counter() - started
    return LoadReport(bytes_read, seconds, plan.num_tensors, plan.warnings)


def _check_arguments(tensors: object, topology: object, rank: object) -> None:
    """What is easily given by mistake. Raises TypeError, ConfigError."""
    if not isinstance(topology, Topology):
        raise TypeError(topology_wanted(topology))
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank is {rank!r}: give a whole number, pp_rank * tp + tp_rank")
    if any(each.__module__.partition(".")[0] == "transformers" for each in type(tensors).__mro__):
        raise ConfigError(
            f"a transformers {type(tensors).__name__} has Hugging Face's parameter names, and its "
            "own from_pretrained: load_into fills a Nanotron model, or a dict from Nanotron's "
            "parameter names to this rank's tensors"
        )
    if not isinstance(tensors, Mapping | torch.nn.Module):
        raise TypeError(
            f"tensors is a {type(tensors).__name__}: give a module with Nanotron's parameter "
            "names, or a dict from those names to this rank's tensors"
        )
    if isinstance(tensors, Mapping):
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name}: a {type(tensor).__name__}, not a tensor")


def read_moves(
    transfer: MovePlan,
    tensors: Sequence[torch.Tensor],
    device: torch.device,
    *,
    workers: int | None = None,
    staging_bytes: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> int:
    """Carries out moves from files to tensors, and returns the bytes read. Raises OSError.

    Args:
        transfer: moves that fit the files and the tensors; a move's destination is a tensor's
            position.
        tensors: as `check_tensors` has found them.
        device: where all of them are.
        workers, staging_bytes, on_progress: as for `load_into`.
    """
    loader = _Loader(
        transfer,
        [tensor.detach() for tensor in tensors],
        device,
        default_workers() if workers is None else workers,
        staging_bytes or _STAGING_BYTES.get(device.type, _STAGING_BYTES["cuda"]),
    )
    return loader.run(on_progress)


def check_tensors(
    named: Mapping[str, torch.Tensor], wanted: torch.device | None = None
) -> torch.device:
    """The device of all tensors. Raises ValueError, naming one that cannot be read into."""
    device = wanted
    for name, tensor in named.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: {tensor.dtype} is not one of {', '.join(map(str, DTYPES))}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: it is not contiguous: its strides are {tensor.stride()}")
        found = tensor.device
        is_other = device is not None and (
            found.type != device.type or device.index not in (None, found.index)
        )
        if is_other or found.type == "meta":
            raise ValueError(f"{name}: it is on {found}, not on {device or 'a device'}")
        device = found
    return device or torch.device("cpu")


class _Loader:
    """Reads one batch into a staging buffer while the one before it is packed from the other."""

    def __init__(
        self,
        transfer: MovePlan,
        tensors: Sequence[torch.Tensor],
        device: torch.device,
        workers: int,
        staging_bytes: int,
    ) -> None:
        self.paths = [os.fsencode(path) for path in transfer.sources]
        self.tensors = tensors
        self.device = device
        self.workers = workers
        self.batches = list(
            batches_of(
                transfer.moves,
                staging_bytes,
                staging=len(tensors),
                reads_direct=device.type == "cpu",
            )
        )
        size = max((batch.staged_bytes for batch in self.batches), default=0)
        is_cuda = device.type == "cuda"
        self.host = [torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
        self.staging = self.host
        if device.type != "cpu":
            self.staging = [torch.empty_like(buffer, device=device) for buffer in self.host]
        # On a GPU: when the last that reads from a buffer is done.
        self.is_read: list[Any] = [None, None]

    def run(self, on_progress: ProgressCallback | None) -> int:
        """Returns the bytes read."""
        bytes_read = 0
        with ThreadPoolExecutor(1, "nanotron_fast-load") as reader:
            pending = reader.submit(self._read, 0) if self.batches else None
            for index in range(len(self.batches)):
                assert pending is not None
                bytes_read += pending.result()
                if index + 1 < len(self.batches):
                    pending = reader.submit(self._read, index + 1)
                self._pack(index)
                if on_progress is not None:
                    on_progress(bytes_read)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        for tensor in self.tensors:
            torch.autograd.graph.increment_version(tensor)
        return bytes_read

    def _read(self, index: int) -> int:
        event = self.is_read[index % 2]
        if event is not None:
            event.synchronize()
        memories = [_memory(tensor) for tensor in (*self.tensors, self.host[index % 2])]
        reads = self.batches[index].reads
        return _C.read_ranges(
            self.paths, table_of(reads), memories, workers=self.workers, scales=scales_of(reads)
        )

    def _pack(self, index: int) -> None:
        batch, host, staging = self.batches[index], self.host[index % 2], self.staging[index % 2]
        if not batch.packs:
            return
        if staging is not host:
            filled = slice(0, batch.staged_bytes)
            staging[filled].copy_(host[filled], non_blocking=True)
        # The tensors of this batch alone: a launch looks at all that it is given.
        used = sorted({move.destination for move in batch.packs})
        numbers = {tensor: number for number, tensor in enumerate(used)}
        moves = [replace(move, destination=numbers[move.destination]) for move in batch.packs]
        pack.run(table_of(moves), [staging], [self.tensors[i] for i in used])
        if self.device.type == "cuda":
            self.is_read[index % 2] = torch.cuda.Event()
            self.is_read[index % 2].record(torch.cuda.current_stream(self.device))


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()
