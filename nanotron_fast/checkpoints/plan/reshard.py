"""Planning the way from a Nanotron checkpoint to the same at another topology.

The weights are the same bytes, cut elsewhere; what lies beside them is carried, with the topology
and the place in it changed. States of training are left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.plan.beside import beside_resharded, training_document
from nanotron_fast.checkpoints.plan.intersection import plan_moves
from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.plan.sides import NanotronTarget
from nanotron_fast.checkpoints.stored import (
    NanotronModel,
    check_divides,
    count_parameters,
    main_dtype_of,
)
from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron import checkpoint as nanotron
from nanotron_fast.formats.nanotron import side_file
from nanotron_fast.formats.nanotron.checkpoint import NanotronCheckpoint
from nanotron_fast.formats.nanotron.stages import Stages
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.plan import MovePlan

_STATES = ("optimizer", "lr_scheduler", "random")


def plan_reshard(source: NanotronCheckpoint, destination: str | Path, options: Options) -> Plan:
    """Plans it. `destination` is the final absolute path, which config.yaml names.

    Raises CheckpointError, ConfigError, TopologyError, UnsupportedModelError.
    """
    options.reject_for("resharding")
    topology = options.topology
    model = NanotronModel(source, options)
    stages = Stages(model.padded_spec, model.model_class, topology)
    params = model.params()
    check_divides(params, topology, can_pad=False)
    reader = model.reader()
    metadata = _metadata(source)
    writer = NanotronTarget(
        params,
        {param.name: reader.dtype(param) for param in params},
        topology,
        stage_of=stages.of,
        version=str(metadata["version"]),
    )
    moves = tuple(named.move for named in plan_moves(params, reader, writer))
    model.check_leftovers(reader)
    beside = beside_resharded(source, options)
    warnings = [*model.warnings, *beside.warnings]
    documents: dict[str, Callable[[], bytes]] = {
        nanotron.MODEL_CONFIG: partial(_compact, source.model_config),
        nanotron.METADATA: partial(_indented, {**metadata, "tp": topology.tp, "dp": 1}),
    }
    if (source.root / side_file.NAME).is_file():
        side = read_json_object(source.root / side_file.NAME)
        documents[side_file.NAME] = partial(_indented, {**side, "carried": sorted(beside.copies)})
    training, problem = training_document(source.root)
    if isinstance(training, Mapping):
        has_tokenizer = beside.has_tokenizer
        documents[nanotron.CONFIG_YAML] = partial(
            _yaml, _at(training, topology, destination, has_tokenizer)
        )
    elif problem is None and (source.root / nanotron.CONFIG_YAML).is_file():
        problem = f"{nanotron.CONFIG_YAML} is not a mapping of sections"
    if problem is not None:
        warnings.append(f"{problem}: none is written")
    states = [name for name in _STATES if (source.root / name).is_dir()]
    if states:
        warnings.append(
            f"{source.root}: {', '.join(states)} are left behind: they belong to the old topology. "
            "Start from the weights (model.init_method.path in config.yaml)"
        )
    plan = Plan(
        direction="nanotron",
        source=source.root,
        family=model.family.name,
        model_class=model.model_class.name,
        spec=model.spec,
        topology=topology,
        dtype=main_dtype_of(params, reader),
        num_parameters=count_parameters(params),
        layer_stages=stages.layers,
        transfer=MovePlan(tuple(reader.files.paths), tuple(writer.outputs), moves),
        documents=documents,
        copies=beside.copies,
        source_topology=Topology(tp=source.tp, pp=source.pp),
        warnings=tuple(warnings),
        ignored=source.ignored,
        left_behind=tuple(name for name in beside.left_behind if name.rstrip("/") not in states),
    )
    plan.check()
    return plan


def _metadata(source: NanotronCheckpoint) -> Mapping[str, Any]:
    """The source's, or that of a checkpoint that nothing was trained on yet. CheckpointError."""
    path = source.root / nanotron.METADATA
    if not path.is_file():
        return nanotron.metadata_document("1.5", source.tp)
    document = read_json_object(path)
    version = document.get("version")
    if not isinstance(version, str):
        raise CheckpointError(f"{path}: version is {version!r}, and should be text such as '1.5'")
    return document


def _at(
    training: Mapping[str, Any], topology: Topology, destination: str | Path, has_tokenizer: bool
) -> dict[str, Any]:
    """A training configuration at another topology, which starts from the new checkpoint."""
    document = dict(training)
    parallelism = document.get("parallelism")
    if isinstance(parallelism, Mapping):
        document["parallelism"] = {**parallelism, "tp": topology.tp, "pp": topology.pp}
    model = document.get("model")
    if isinstance(model, Mapping):
        document["model"] = {**model, "init_method": {"path": str(destination)}}
    tokenizer = document.get("tokenizer")
    if isinstance(tokenizer, Mapping) and has_tokenizer:
        document["tokenizer"] = {**tokenizer, "tokenizer_name_or_path": str(destination)}
    checkpoints = document.get("checkpoints")
    if isinstance(checkpoints, Mapping) and checkpoints.get("resume_checkpoint_path") is not None:
        # It would look there for optimizer states of this topology, which there are none of.
        document["checkpoints"] = {**checkpoints, "resume_checkpoint_path": None}
    return document


def _compact(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode()


def _indented(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True).encode()


def _yaml(document: Mapping[str, Any]) -> bytes:
    import yaml

    return str(yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)).encode()
