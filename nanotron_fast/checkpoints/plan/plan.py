"""A conversion, ready to be executed or printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanotron_fast.checkpoints.plan.equality import MustBeEqual
from nanotron_fast.checkpoints.remote.mirror import shown
from nanotron_fast.model.ranks import Ranks
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.files import ReadFile
from nanotron_fast.moves.move import scales_of, table_of
from nanotron_fast.moves.plan import MovePlan
from nanotron_fast.units import count, size

if TYPE_CHECKING:
    from nanotron_fast.formats.nanotron.optimizer import Sizes


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a conversion will do.

    `layer_stages` is the stage of each decoder layer, `other_stages` that of the pipeline's other
    blocks: "embedding", "norm", "head", "cast" (of logits, to fp32) and "loss".
    """

    direction: str
    source: Path
    family: str
    model_class: str
    spec: ModelSpec
    topology: Topology
    dtype: Dtype
    num_parameters: int
    layer_stages: tuple[int, ...]
    transfer: MovePlan
    # The small files, by name: what makes their contents, and what is copied as it is.
    documents: dict[str, Callable[[], bytes]]
    copies: dict[str, Path]
    other_stages: Mapping[str, int] = field(default_factory=dict)
    # "hf" or "dcp", of a source that is a published model; None where it is Nanotron's.
    published_format: str | None = None
    # What the source holds twice, or more: copies of a tied matrix, and of key-value heads.
    must_be_equal: tuple[MustBeEqual, ...] = ()
    # That of a Nanotron source which is written at another one.
    source_topology: Topology | None = None
    # The ranks that states of training are written for, and that wrote them; None without states.
    states: Sizes | None = None
    source_states: Sizes | None = None
    warnings: tuple[str, ...] = field(default=())
    # Tensors that the user asked to leave out, and what lies beside the source and is not copied.
    ignored: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    # Compares what the source holds twice, and raises CheckpointError where it differs.
    check_source: Callable[[], None] | None = None
    # What the sources were when their headers were read, where that was noted, and what the small
    # files were that the plan was made from.
    sources_read: Mapping[Path, ReadFile] = field(default_factory=dict)

    def __repr__(self) -> str:
        files = count(len(self.transfer.outputs), "file")
        return f"<Plan: {self.what}: {size(self.bytes_written)} in {files}>"

    @property
    def what(self) -> str:
        """The model, from where it comes and what becomes of it, in short."""
        before = after = ""
        if self.source_format == "nanotron":
            before = f" {self.source_topology or self.topology}"
        if self.direction == "nanotron":
            after = f" {self.topology}"
        return (
            f"{self.family}, {self.num_parameters:,} parameters in {self.dtype.short_name}, "
            f"{shown(self.source)} ({self.source_format}{before}) -> {self.direction}{after}"
        )

    def for_ranks(self, ranks: Ranks | None, files: Sequence[tuple[int, int | None]]) -> Plan:
        """The plan with what some ranks need alone.

        Args:
            ranks: None for all.
            files: of each output, its stage, and its tensor-parallel rank where it has one.

        Raises TopologyError.
        """
        if ranks is None:
            return self
        ranks.check(self.topology)
        mine = [number for number, (pp, tp) in enumerate(files) if ranks.have(pp, tp)]
        warning = (
            f"what ranks {ranks} of {self.topology} need is written alone: "
            f"{len(mine):,} of {len(files):,} files"
        )
        return replace(self, transfer=self.transfer.only(mine), warnings=(*self.warnings, warning))

    @property
    def source_format(self) -> str:
        """ "hf", "dcp" or "nanotron"."""
        return self.published_format or "nanotron"

    @property
    def bytes_read(self) -> int:
        """Bytes of the source's tensors."""
        return self.transfer.bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes of the destination's tensor files."""
        return self.transfer.bytes_written

    def check(self) -> None:
        """Proves that every destination byte is written exactly once. Raises PlanError."""
        self.transfer.check()

    def peak_memory_bytes(self, workers: int, *, io: str = "buffered") -> int:
        """Expected: this process as it is, and the engine's buffers.

        Args:
            workers: threads.
            io: how bytes pass, "buffered", "direct" or "dontcache"; the two others are asked for
                more bytes at a time.
        """
        from nanotron_fast import _C

        moves = self.transfer.moves
        buffers = _C.worker_buffer_bytes(table_of(moves), io=io, scales=scales_of(moves))
        return resident_bytes() + workers * buffers

    def to_json(self, workers: int, *, io: str = "buffered") -> dict[str, Any]:
        """The contract of `convert --dry-run --json`."""
        topology = {"tp": self.topology.tp, "pp": self.topology.pp, "ep": self.topology.ep}
        return {
            "family": self.family,
            "model_class": self.model_class,
            "direction": self.direction,
            "topology": topology,
            "dtype": self.dtype.short_name,
            "num_parameters": self.num_parameters,
            "tensor_files": len(self.transfer.outputs),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_memory_bytes": self.peak_memory_bytes(workers, io=io),
            "layer_stages": list(self.layer_stages),
            "warnings": list(self.warnings),
            **self._states_to_json(),
        }

    def _states_to_json(self) -> dict[str, Any]:
        """Only of a plan that takes states of training along."""
        if self.states is None or self.source_states is None:
            return {}
        return {"states": asdict(self.states), "source_states": asdict(self.source_states)}


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return _status_bytes("VmRSS") or _peak_of_process()


def peak_resident_bytes() -> int:
    """The most memory that this program has held."""
    # Not getrusage first: its peak counts what the parent held before this program was started.
    return _status_bytes("VmHWM") or _peak_of_process()


def _status_bytes(key: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(f"{key}:"):
                    return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return None


def _peak_of_process() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
