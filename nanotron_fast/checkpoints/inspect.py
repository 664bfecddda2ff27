"""Saying what a checkpoint is, from its headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanotron_fast.checkpoints.bounds import check_counts
from nanotron_fast.checkpoints.options import InspectChoices, Options, reject_like, takes
from nanotron_fast.checkpoints.remote.mirror import mirror_of, mirrors_closed, shown
from nanotron_fast.checkpoints.remote.packages import require_store
from nanotron_fast.checkpoints.source import read, resolve
from nanotron_fast.checkpoints.stored import NanotronModel, some
from nanotron_fast.errors import CheckpointError, NanotronFastError
from nanotron_fast.families import family_of_config, warnings_about
from nanotron_fast.families.hf_config import read_config
from nanotron_fast.families.refusals import check_config
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint
from nanotron_fast.formats.huggingface.quantization import read_quantization
from nanotron_fast.formats.nanotron.checkpoint import MODEL_CONFIG, NanotronCheckpoint
from nanotron_fast.formats.nanotron.stages import Stages
from nanotron_fast.model.ranks import Ranks
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.dtypes import SAFETENSORS_BITS, Dtype
from nanotron_fast.units import count, size

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint holds. Topology, stages and class are those of a Nanotron one."""

    path: Path | str
    format: str
    family: str | None
    model_class: str | None
    topology: Topology | None
    spec: ModelSpec | None
    # Tensors (parameters, in Nanotron), files, elements and bytes as they are stored.
    num_tensors: int
    tensor_files: int
    num_elements: int
    num_bytes: int
    dtypes: dict[str, int]
    layer_stages: tuple[int, ...]
    has_side_file: bool
    # Why family and architecture are unknown, where they are.
    problem: str | None = None
    # Whether rotary pairs lie beside each other in q and k, in a Nanotron or a DCP checkpoint.
    rope_interleaved: bool | None = None
    # The ranks whose files are there, of a Nanotron checkpoint that is not whole.
    ranks_there: Ranks | None = None
    # How many tensor-parallel ranks have a copy of each key-value head, in a Nanotron checkpoint.
    kv_head_copies: int | None = None
    # The stage of each other block of the pipeline, as in a Plan.
    other_stages: Mapping[str, int] = field(default_factory=dict)
    # How a Hugging Face one's weights are quantised, which a conversion dequantises.
    quantization: str | None = None
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        what = [self.format if self.topology is None else f"{self.format} {self.topology}"]
        what += [name for name in (self.family, self.problem) if name is not None]
        return (
            f"<Inspection: {self.path}, {', '.join(what)}: {self.num_elements:,} elements, "
            f"{size(self.num_bytes)} in {count(self.tensor_files, 'file')}>"
        )

    def to_json(self) -> dict[str, Any]:
        """The contract of `inspect --json`."""
        spec, topology = self.spec, self.topology
        return {
            "path": str(self.path),
            "format": self.format,
            "family": self.family,
            "model_class": self.model_class,
            "topology": topology and {"tp": topology.tp, "pp": topology.pp, "ep": topology.ep},
            "architecture": spec
            and {
                "hidden_size": spec.hidden_size,
                "num_layers": spec.num_layers,
                "num_heads": spec.num_heads,
                "num_kv_heads": spec.num_kv_heads,
                "head_dim": spec.head_dim,
                "intermediate_size": spec.intermediate_size,
                "vocab_size": spec.vocab_size,
                "tie_word_embeddings": spec.tie_word_embeddings,
                "rope_theta": spec.rope_theta,
            },
            "num_tensors": self.num_tensors,
            "tensor_files": self.tensor_files,
            "num_elements": self.num_elements,
            "num_bytes": self.num_bytes,
            "dtypes": self.dtypes,
            "quantization": self.quantization,
            "layer_stages": list(self.layer_stages),
            "has_side_file": self.has_side_file,
            "problem": self.problem,
            "rope_interleaved": self.rope_interleaved,
            "ranks_there": self.ranks_there and self.ranks_there.to_json(),
            "kv_head_copies": self.kv_head_copies,
            "warnings": list(self.warnings),
        }


@takes(InspectChoices)
@mirrors_closed()
def inspect(path: str | Path, **choices: Unpack[InspectChoices]) -> Inspection:
    """Reads a checkpoint's headers and configuration.

    Args:
        path: a directory in any of the formats, a Hub id or a URL.
        choices: the options at the end, each a field of `checkpoints.options.Options`.

    Raises:
        MissingPackageError: what reads from a store is not installed.
        CheckpointError, OSError: it cannot be read. An unsupported model can; see `problem`.
    """
    require_store(path)
    options = Options.of(choices, InspectChoices)
    checkpoint = read(resolve(path, takes_urls=True), like=options.like, takes_part=True)
    if isinstance(checkpoint, HfCheckpoint):
        if checkpoint.format == "hf":
            reject_like(options)
        found = _inspect_hf(checkpoint, options)
    else:
        found = _inspect_nanotron(checkpoint, options)
    if mirror_of(checkpoint.root) is None:
        return found
    return replace(
        found,
        path=shown(found.path),
        problem=None if found.problem is None else shown(found.problem),
        warnings=tuple(map(shown, found.warnings)),
    )


def _inspect_hf(checkpoint: HfCheckpoint, options: Options) -> Inspection:
    name, spec, problem, quantization = None, None, None, None
    warnings: list[str] = []
    try:
        if checkpoint.lacks_config is not None:
            raise CheckpointError(checkpoint.lacks_config)
        config, told = check_config(checkpoint.config, checkpoint.dtypes)
        scheme = read_quantization(checkpoint.config)
        if scheme is None or checkpoint.dtypes <= Dtype.__members__.keys():
            warnings = told
        else:  # in a line of its own
            quantization = str(scheme)
        found = family_of_config(config, options.family)
        warnings += warnings_about(found, config)
        name, spec = found.name, read_config(found, config)
        check_counts(spec, checkpoint)
    except NanotronFastError as error:
        problem = str(error)
    infos = [tensor.info for tensor in checkpoint.tensors.values()]
    return Inspection(
        path=checkpoint.root,
        format=checkpoint.format,
        family=name,
        model_class=None,
        topology=None,
        spec=spec,
        num_tensors=len(infos),
        tensor_files=len(
            {chunk.path for tensor in checkpoint.tensors.values() for chunk in tensor.pieces}
        ),
        layer_stages=(),
        has_side_file=False,
        problem=problem,
        quantization=quantization,
        rope_interleaved=checkpoint.rope_interleaved if checkpoint.format == "dcp" else None,
        warnings=(*warnings, *(checkpoint.warnings if checkpoint.format == "dcp" else ())),
        **_totals([(info.dtype, info.num_elements) for info in infos]),
    )


def _inspect_nanotron(checkpoint: NanotronCheckpoint, options: Options) -> Inspection:
    topology = Topology(tp=checkpoint.tp, pp=checkpoint.pp, ep=checkpoint.ep)
    model: NanotronModel | None = None
    stages: Stages | None = None
    problem: str | None = None
    missing: list[str] = []
    try:
        model = NanotronModel(checkpoint, options)
        stages = Stages(model.padded_spec, model.model_class, topology)
        missing = [each.name for each in model.params() if each.name not in checkpoint.params]
    except NanotronFastError as error:
        problem = str(error)
    there = checkpoint.there
    if there is not None and there.tp is None and model is not None and not missing:
        there = None  # a stage without a file of its own
    warnings = model.all_warnings() if model else []
    if missing and there is None:
        warnings.append(
            f"{len(missing):,} parameters that {MODEL_CONFIG} calls for are missing: "
            f"{some(missing)}"
        )
    shards = [shard for shards in checkpoint.params.values() for shard in shards]
    return Inspection(
        path=checkpoint.root,
        format="nanotron",
        family=model.family.name if model else None,
        model_class=model.model_class.name if model else None,
        topology=topology,
        spec=model.spec if model else None,
        num_tensors=len(checkpoint.params),
        tensor_files=len(shards),
        layer_stages=stages.layers if stages else (),
        other_stages=stages.others if stages else {},
        has_side_file=model is not None and model.side is not None,
        problem=problem,
        rope_interleaved=model.is_interleaved if model else None,
        ranks_there=there,
        kv_head_copies=_kv_head_copies(model) if model else None,
        warnings=tuple(warnings),
        **_totals([(shard.info.dtype, shard.info.num_elements) for shard in shards]),
    )


def _kv_head_copies(model: NanotronModel) -> int:
    return model.spec.copies_of_kv_heads(model.checkpoint.tp) if model.copies_kv_heads else 1


def _totals(tensors: list[tuple[str, int]]) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for dtype, num_elements in tensors:
        dtypes[dtype] += num_elements
    return {
        "num_elements": sum(dtypes.values()),
        "num_bytes": sum(count * SAFETENSORS_BITS[dtype] // 8 for dtype, count in dtypes.items()),
        "dtypes": dict(dtypes),
    }
