"""Planning the way from Hugging Face to Nanotron."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.plan.beside import beside_published
from nanotron_fast.checkpoints.plan.intersection import plan_moves
from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.plan.sides import HfSource, NanotronTarget
from nanotron_fast.checkpoints.stored import HfModel, check_divides, count_parameters
from nanotron_fast.errors import UnsupportedModelError
from nanotron_fast.families.parts import Param
from nanotron_fast.families.refusals import (
    check_experts,
    check_kv_heads,
    check_model,
    choose_class,
    target_of,
)
from nanotron_fast.families.unknown_fields import with_unknown_fields
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint, check_rival_bytes
from nanotron_fast.formats.nanotron import checkpoint as nanotron
from nanotron_fast.formats.nanotron import side_file
from nanotron_fast.formats.nanotron.classes import NanotronClass
from nanotron_fast.formats.nanotron.side_file import SideFile
from nanotron_fast.formats.nanotron.stages import Stages
from nanotron_fast.formats.nanotron.training_config import training_config
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.plan import MovePlan
from nanotron_fast.version import __version__


def plan_to_nanotron(source: HfCheckpoint, destination: str | Path, options: Options) -> Plan:
    """Plans a conversion. `destination` is the final absolute path, which config.yaml names.

    Raises CheckpointError, ConfigError, TopologyError, UnsupportedModelError.
    """
    options.reject_for("nanotron")
    version = options.checkpoint_version or "1.5"
    topology = options.topology
    model = HfModel(source, options)
    source, family, spec = model.checkpoint, model.family, model.spec
    warnings = list(model.warnings)
    target = target_of(family, options.target)
    with model.judged():
        model_class = choose_class(family, spec, options.model_class, target, tp=topology.tp)
    # Nanotron 0.4 has no other way; Starcoder2 rotates halves in every version.
    interleaved = options.rope_interleaved
    if interleaved is None:
        interleaved = version == "1.2" and model_class.rotates_neighbours_in_1_2
    with model.judged():
        check_model(
            family, spec, model_class, target=target, version=version, rope_interleaved=interleaved
        )
        check_experts(model_class, spec, topology.ep)
    multiple = options.pad_vocab_to_multiple_of or 1
    padded_vocab = math.ceil(spec.vocab_size / multiple) * multiple
    padded_spec = replace(spec, vocab_size=padded_vocab)
    stages = Stages(padded_spec, model_class, topology)
    params = model.params(
        vocab_size=padded_vocab,
        rope_interleaved=interleaved,
        copies_kv_heads=model_class.copies_kv_heads,
    )
    option = "--model-class auto" if target == "nanotron-fast" else "--target nanotron-fast"
    way = f"{option} gives each of them to {spec.copies_of_kv_heads(topology.tp)} ranks"
    check_kv_heads(params, model_class, spec, topology.tp, way=way)
    check_divides(params, topology)
    reader = HfSource(source)
    most = stored_dtype(source, params, reader, options.dtype)
    main_dtype = options.dtype or most
    warnings += source.warnings
    dtypes = {
        param.name: Dtype.F32
        if param.is_fp32
        else options.dtype or _widest(param, reader, warnings)
        for param in params
    }
    writer = NanotronTarget(
        params,
        dtypes,
        topology,
        stage_of=stages.of,
        version=version,
    )
    moves = tuple(named.move for named in plan_moves(params, reader, writer))
    duplicates = model.check_leftovers(reader)
    model_config = model_class.write(
        padded_spec, family=family.name, version=version, rope_interleaved=interleaved
    )
    stored_config, kept_warnings = with_unknown_fields(model_config, source.config)
    warnings += kept_warnings
    beside = beside_published(source, options)
    warnings += beside.warnings
    if source.absent is not None:
        warnings.append(
            f"{source.root}: the index places {source.absent} in a file that does not hold it; the "
            "model is tied, and needs none"
        )
    warnings += stages.warnings()
    warnings += _warnings(model_class, topology, version)
    warnings += _target_warnings(spec, model_class)
    side = SideFile(
        tool_version=__version__,
        family=family.name,
        target=target,
        dtype=main_dtype.short_name,
        vocab_size=spec.vocab_size,
        config=source.config,
        generation_config=source.generation_config,
        dtypes=_other_dtypes(params, reader, dtypes, most, options.dtype),
        carried=sorted(beside.copies),
    )
    metadata = nanotron.metadata_document(version, topology.tp)
    documents: dict[str, Callable[[], bytes]] = {
        nanotron.MODEL_CONFIG: lambda: json.dumps(stored_config).encode(),
        nanotron.METADATA: lambda: json.dumps(metadata, indent=2, sort_keys=True).encode(),
        side_file.NAME: side.to_bytes,
    }
    if model_class.starts_from_yaml:
        documents[nanotron.CONFIG_YAML] = partial(
            training_config,
            model_config,
            root=destination,
            dtype=main_dtype.torch_name,
            tp=topology.tp,
            pp=topology.pp,
            version=version,
            tokenizer=str(destination) if beside.has_tokenizer else None,
        )
    plan = Plan(
        direction="nanotron",
        source=source.root,
        family=family.name,
        model_class=model_class.name,
        spec=spec,
        topology=topology,
        dtype=main_dtype,
        num_parameters=count_parameters(params),
        layer_stages=stages.layers,
        other_stages=stages.others,
        transfer=MovePlan(tuple(reader.files.paths), tuple(writer.outputs), moves),
        documents=documents,
        copies=beside.copies,
        published_format=source.format,
        must_be_equal=duplicates,
        warnings=tuple(warnings),
        ignored=source.ignored,
        left_behind=beside.left_behind,
        check_source=partial(check_rival_bytes, source) if source.rivals else None,
    )
    plan.check()
    return plan.for_ranks(options.ranks_only, writer.ranks)


def stored_dtype(
    source: HfCheckpoint, params: list[Param], reader: HfSource, cast: Dtype | None
) -> Dtype:
    """The dtype of most elements. Raises UnsupportedModelError where F64 would be cast."""
    counts: Counter[Dtype] = Counter()
    for param in params:
        for part in param.parts:
            dtype = reader.dtype(part)
            counts[dtype] += math.prod(part.sizes)
            if dtype is Dtype.F64 and (cast is not None or param.is_fp32):
                raise UnsupportedModelError(
                    f"{source.root}: {part.name} is F64, which is not cast; use --dtype keep"
                )
    return counts.most_common(1)[0][0]


def _widest(param: Param, reader: HfSource, warnings: list[str]) -> Dtype:
    """The dtype that holds every value of the tensors that make a parameter."""
    dtypes = {reader.dtype(part) for part in param.parts}
    if len(dtypes) == 1:
        return dtypes.pop()
    if Dtype.F64 in dtypes:
        raise UnsupportedModelError(
            f"{param.name} is made of tensors of different dtypes, F64 among them"
        )
    names = ", ".join(sorted(dtype.short_name for dtype in dtypes))
    warnings.append(f"{param.name} is made of tensors in {names}: all of it is written in fp32")
    return Dtype.F32


def _other_dtypes(
    params: list[Param],
    reader: HfSource,
    written: dict[str, Dtype],
    stored: Dtype,
    cast: Dtype | None,
) -> dict[str, str]:
    """Dtypes to restore on the way back: where it would not choose the tensor's own.

    A router that is trained takes the model's dtype then, and other tensors that of their
    parameter, which may be wider than some of those that it is made of.
    """
    others: dict[str, str] = {}
    for param in params:
        for part in param.parts:
            dtype = reader.dtype(part)
            is_models = param.is_fp32 and not param.is_frozen
            expected = stored if is_models else written[param.name]
            is_cast = cast is not None and not param.is_fp32
            if dtype is not expected and not is_cast:
                others[part.name] = dtype.name
    return others


def _target_warnings(spec: ModelSpec, model_class: NanotronClass) -> list[str]:
    """What runs a model that stock Nanotron does not."""
    warnings: list[str] = []
    if not model_class.is_stock:
        warnings.append(
            f"model_config.json and config.yaml are a {model_class}, which stock Nanotron refuses: "
            "nanotron-fast train trains it"
        )
    elif spec.rope_scaling is not None:
        warnings.append(
            "Nanotron by itself ignores rope_scaling: train with nanotron-fast train, with "
            "nanotron-fast run --rope-scaling, or nanotron_fast.enable(rope_scaling=True)"
        )
    return warnings


def _warnings(model_class: NanotronClass, topology: Topology, version: str) -> list[str]:
    warnings: list[str] = []
    if topology.pp > 1 and version in model_class.pp_warning:
        warnings.append(model_class.pp_warning[version].format(pp=topology.pp))
    if not model_class.starts_from_yaml:
        warnings.append(
            f"no config.yaml is written: Nanotron cannot start a {model_class.option.title()} from "
            f"one (it asks for num_key_value_heads, which {model_class} lacks)"
        )
    return warnings
