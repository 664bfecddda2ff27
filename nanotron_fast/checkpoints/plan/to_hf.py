"""Planning the way from Nanotron to Hugging Face, or to torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.plan.beside import beside_hf, original_of_training
from nanotron_fast.checkpoints.plan.hf_config import hf_config
from nanotron_fast.checkpoints.plan.intersection import plan_moves
from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.plan.publishing import is_interleaved, json_bytes, publish
from nanotron_fast.checkpoints.plan.sides import NanotronSource
from nanotron_fast.checkpoints.stored import NanotronModel, count_parameters, main_dtype_of
from nanotron_fast.errors import CheckpointError
from nanotron_fast.families.parts import Param
from nanotron_fast.families.refusals import check_expressible, check_model
from nanotron_fast.formats.huggingface import checkpoint as hf
from nanotron_fast.formats.nanotron import side_file
from nanotron_fast.formats.nanotron.checkpoint import MODEL_CONFIG, NanotronCheckpoint
from nanotron_fast.formats.nanotron.side_file import SideFile
from nanotron_fast.formats.nanotron.stages import Stages
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.plan import MovePlan

if TYPE_CHECKING:
    from nanotron_fast.checkpoints.plan.masters import MastersSource


def plan_to_hf(source: NanotronCheckpoint, options: Options) -> Plan:
    """Plans a conversion.

    Raises CheckpointError, ConfigError, TopologyError, UnsupportedModelError.
    """
    to = options.to or "hf"
    options.reject_for("dcp" if to == "dcp" else "hf")
    model = NanotronModel(source, options)
    family, spec = model.family, model.spec
    # A checkpoint is refused for what was wrong with it in Nanotron, too: it computed otherwise.
    with model.judged():
        check_model(
            family,
            spec,
            model.model_class,
            target=model.target,
            version=options.checkpoint_version or "1.5",
            rope_interleaved=None,
        )
    check_expressible(family, spec)
    params = model.params(tensors_interleaved=is_interleaved(to, options.names))
    masters: MastersSource | None = None
    if options.master_weights:
        # The states of training are what few conversions read.
        from nanotron_fast.checkpoints.plan.masters import MastersSource

        masters = MastersSource(source)
    reader = masters or NanotronSource(source)
    main_dtype = options.dtype or main_dtype_of(params, reader)
    cast = main_dtype if options.master_weights else options.dtype
    dtypes = _hf_dtypes(params, reader, model, cast, main_dtype)
    published = publish(params, dtypes, family, to, options)
    writer = published.target
    moves = tuple(named.move for named in plan_moves(params, reader, writer))
    model.check_leftovers(reader)
    copies = tuple(reader.copies(params))

    config, warnings = hf_config(model, main_dtype)
    warnings = [*model.all_warnings(), *warnings]
    beside = beside_hf(source, config, options)
    warnings += [*beside.warnings, *_unknown(model, options)]
    documents: dict[str, Callable[[], bytes]] = {hf.CONFIG: partial(json_bytes, config)}
    generation_config = _generation_config(model.side, spec)
    if generation_config is not None:
        documents[hf.GENERATION_CONFIG] = partial(json_bytes, generation_config)
    documents.update(published.documents)
    topology = Topology(tp=source.tp, pp=source.pp, ep=source.ep)
    stages = Stages(model.padded_spec, model.model_class, topology)
    plan = Plan(
        direction=to,
        source=source.root,
        family=family.name,
        model_class=model.model_class.name,
        spec=spec,
        topology=topology,
        dtype=main_dtype,
        num_parameters=count_parameters(params),
        layer_stages=stages.layers,
        other_stages=stages.others,
        transfer=MovePlan(tuple(reader.files.paths), tuple(writer.outputs), moves),
        documents=documents,
        copies=beside.copies,
        must_be_equal=copies,
        warnings=tuple(warnings),
        ignored=source.ignored,
        left_behind=beside.left_behind,
        sources_read=masters.states.read_files if masters else {},
    )
    plan.check()
    return plan


def _hf_dtypes(
    params: list[Param],
    reader: NanotronSource,
    model: NanotronModel,
    cast: Dtype | None,
    main: Dtype,
) -> dict[str, Dtype]:
    """The dtype of each Hugging Face tensor: its original one where that is known to differ.

    A router takes the model's otherwise, and others that of their parameter.
    """
    dtypes: dict[str, Dtype] = {}
    originals = {
        name: Dtype[dtype]
        for name, dtype in (model.side.dtypes if model.side else {}).items()
        if dtype in Dtype.__members__ and dtype != Dtype.F64.name
    }
    for param in params:
        stored = reader.dtype(param)
        if stored is Dtype.F64 and (cast is not None or param.is_fp32):
            raise CheckpointError(f"{param.name} is F64, which is not cast; use --dtype keep")
        for part in param.parts:
            name = part.name
            if cast is None and name in originals and stored is not Dtype.F64:
                dtypes[name] = originals[name]
            else:
                # What is not trained keeps its bits, which a router's weight had not.
                dtypes[name] = main if param.is_fp32 and not param.is_frozen else cast or stored
    return dtypes


def _unknown(model: NanotronModel, options: Options) -> list[str]:
    """What cannot be known of a checkpoint that Nanotron saved, and how to give it."""
    if model.side is not None:
        return []
    rows = ""
    if options.vocab_size is None:
        rows = f"; all {model.padded_vocab_size} rows of the vocabulary are written, padding too"
    original = original_of_training(model.checkpoint.root) or "DIR_OR_ID"
    return [
        f"{model.checkpoint.root} has no {side_file.NAME}: config.json and generation_config.json "
        f"are made from {MODEL_CONFIG} alone, which has one eos_token_id where the original may "
        f"have had several{rows}. --like {original} takes them from the original"
    ]


def _generation_config(side: SideFile | None, spec: ModelSpec) -> dict[str, Any] | None:
    if side is not None and side.config is not None:
        return None if side.generation_config is None else dict(side.generation_config)
    tokens = {
        name: getattr(spec, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return {
        "_from_model_config": True,
        **{name: value for name, value in tokens.items() if value is not None},
    }
