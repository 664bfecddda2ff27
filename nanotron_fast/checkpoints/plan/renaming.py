"""Planning the way from one published form of a model to another: DCP and Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.plan.beside import beside_published
from nanotron_fast.checkpoints.plan.intersection import plan_moves
from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.plan.publishing import is_interleaved, json_bytes, publish
from nanotron_fast.checkpoints.plan.to_nanotron import stored_dtype
from nanotron_fast.checkpoints.stored import HfModel, count_parameters
from nanotron_fast.formats.huggingface import checkpoint as hf
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint, check_rival_bytes
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.plan import MovePlan


def plan_renaming(source: HfCheckpoint, options: Options) -> Plan:
    """Plans a conversion. `options.to` is "hf" or "dcp".

    Raises CheckpointError, ConfigError, UnsupportedModelError.
    """
    options.reject_for("renaming")
    to = options.to or "hf"
    model = HfModel(source, options)
    source, family, spec = model.checkpoint, model.family, model.spec
    will_be_interleaved = is_interleaved(to, options.names)
    has_pairs = model.tensors_interleaved != will_be_interleaved
    stored = model.params(has_rope_pairs=has_pairs)
    params = model.params(has_rope_pairs=has_pairs, tensors_interleaved=will_be_interleaved)
    reader = model.reader()
    main_dtype = options.dtype or stored_dtype(source, stored, reader, options.dtype)
    dtypes = {
        part.name: options.dtype or reader.dtype(part) for param in stored for part in param.parts
    }
    published = publish(params, dtypes, family, to, options)
    moves = tuple(
        named.move for named in plan_moves(params, reader, published.target, source_params=stored)
    )
    duplicates = model.check_leftovers(reader)
    beside = beside_published(source, options)
    documents: dict[str, Callable[[], bytes]] = {
        hf.CONFIG: partial(json_bytes, _config(source.config, main_dtype))
    }
    if source.generation_config is not None:
        documents[hf.GENERATION_CONFIG] = partial(json_bytes, source.generation_config)
    documents.update(published.documents)
    plan = Plan(
        direction=to,
        source=source.root,
        family=family.name,
        model_class=family.architecture,
        spec=spec,
        topology=Topology(),
        dtype=main_dtype,
        num_parameters=count_parameters(params),
        layer_stages=(0,) * spec.num_layers,
        transfer=MovePlan(tuple(reader.files.paths), tuple(published.target.outputs), moves),
        documents=documents,
        copies=beside.copies,
        published_format=source.format,
        must_be_equal=duplicates,
        warnings=(*model.warnings, *source.warnings, *beside.warnings),
        ignored=source.ignored,
        left_behind=beside.left_behind,
        check_source=partial(check_rival_bytes, source) if source.rivals else None,
    )
    plan.check()
    return plan


def _config(config: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    """The source's own, with the dtype that is written."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: dtype.torch_name}
