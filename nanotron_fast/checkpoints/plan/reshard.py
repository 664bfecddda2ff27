"""Planning the way from a Nanotron checkpoint to the same at another topology.

The weights are the same bytes, cut elsewhere; what lies beside them is carried, with the topology
and the place in it changed. The states of training are parameters under other names, and go the
same way where they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.plan.beside import beside_resharded, training_document
from nanotron_fast.checkpoints.plan.intersection import plan_moves
from nanotron_fast.checkpoints.plan.masters import copies_of_states
from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.plan.sides import NanotronTarget
from nanotron_fast.checkpoints.plan.states import StatesTarget
from nanotron_fast.checkpoints.states import TrainingStates
from nanotron_fast.checkpoints.stored import (
    NanotronModel,
    check_divides,
    count_parameters,
    main_dtype_of,
)
from nanotron_fast.errors import (
    CheckpointError,
    ConfigError,
    TopologyError,
)
from nanotron_fast.families.refusals import check_experts, check_kv_heads
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron import checkpoint as nanotron
from nanotron_fast.formats.nanotron import side_file
from nanotron_fast.formats.nanotron.checkpoint import OPTIMIZER, NanotronCheckpoint
from nanotron_fast.formats.nanotron.optimizer import (
    LR_SCHEDULER,
    OPTIMIZER_CONFIG,
    RANDOM,
    Sizes,
    check_beside_weights,
)
from nanotron_fast.formats.nanotron.stages import Stages
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.plan import MovePlan

_STATES = (OPTIMIZER, LR_SCHEDULER, RANDOM)


@dataclass(frozen=True, slots=True)
class Training:
    """What is asked for where the states of training go along.

    Attributes:
        dp: data-parallel ranks; None for as many as there were.
        zero_stage: 0 for whole states in the files of the first of them, 1 for a run in the file of
            each; None for what there was.
    """

    dp: int | None = None
    zero_stage: int | None = None


def plan_reshard(
    source: NanotronCheckpoint,
    destination: str | Path,
    options: Options,
    training: Training | None = None,
) -> Plan:
    """Plans it. `destination` is the final absolute path, which config.yaml names.

    With `training` the states of training go along, where there are some, and a vocabulary that
    does not divide gets more rows. Without it they are left behind.

    Raises CheckpointError, ConfigError, TopologyError, UnsupportedModelError.
    """
    options.reject_for("resharding")
    topology = options.topology
    model = NanotronModel(source, options)
    document, problem = training_document(source.root)
    num_rows = model.padded_vocab_size
    if training is not None:
        num_rows = _rows_at(num_rows, topology.tp, document)
    params, stored_params = model.params(vocab_size=num_rows), model.params()
    check_experts(model.model_class, model.spec, topology.ep)
    way = "nanotron-fast convert --target nanotron-fast writes them, from Hugging Face"
    check_kv_heads(params, model.model_class, model.spec, topology.tp, way=way)
    check_divides(params, topology, can_pad=False)
    spec = replace(model.padded_spec, vocab_size=num_rows)
    stages = Stages(spec, model.model_class, topology)
    reader = model.reader()
    metadata = _metadata(source)
    writer = NanotronTarget(
        params,
        {param.name: reader.dtype(param) for param in stored_params},
        topology,
        stage_of=stages.of,
        version=str(metadata["version"]),
    )
    named = plan_moves(params, reader, writer, source_params=stored_params)
    moves = [each.move for each in named]
    model.check_leftovers(reader)
    copies_of_heads = [*reader.copies(stored_params)]
    beside = beside_resharded(source, options)
    warnings = [*model.all_warnings(), *beside.warnings, *stages.warnings()]
    if num_rows != model.padded_vocab_size:
        warnings.append(
            f"the vocabulary gets {num_rows - model.padded_vocab_size} rows of zeros, to "
            f"{num_rows}: {model.padded_vocab_size} do not split over tp={topology.tp}"
        )
    states = _states(source, training)
    copies = dict(beside.copies)
    documents: dict[str, Callable[[], bytes]] = {}
    if training is None:
        sizes = Sizes(topology.tp, topology.pp, 1, ep=topology.ep)
    else:
        sizes = _sizes(topology, metadata, states, training)
    if states is not None:
        target = StatesTarget(
            states,
            params,
            stored_params,
            sizes,
            stage_of=stages.of,
            has_tied_copy=model.spec.tie_word_embeddings
            and stages.of("head") != stages.of("embedding"),
        )
        moves.extend(target.plan(reader.files.number, writer.outputs))
        copies_of_heads += copies_of_states(states, stored_params, reader.files.number)
        documents[f"{OPTIMIZER}/{OPTIMIZER_CONFIG}"] = target.config
        copies |= target.random_files()
    model_config = {**source.model_config, "vocab_size": num_rows}
    documents |= {
        nanotron.MODEL_CONFIG: partial(_compact, model_config),
        nanotron.METADATA: partial(_indented, {**metadata, "tp": sizes.tp, "dp": sizes.dp}),
    }
    if (source.root / side_file.NAME).is_file():
        side = read_json_object(source.root / side_file.NAME)
        documents[side_file.NAME] = partial(_indented, {**side, "carried": sorted(beside.copies)})
    if isinstance(document, Mapping):
        has_tokenizer = beside.has_tokenizer
        if states is None:
            changed = _from_weights(document, topology, destination, has_tokenizer)
        else:
            warnings += _batch_warnings(document, sizes)
            changed = _going_on(document, sizes, destination, has_tokenizer, num_rows)
        documents[nanotron.CONFIG_YAML] = partial(_yaml, changed)
    elif problem is None and (source.root / nanotron.CONFIG_YAML).is_file():
        problem = f"{nanotron.CONFIG_YAML} is not a mapping of sections"
    if problem is not None:
        warnings.append(f"{problem}: none is written")
    left = [name for name in _STATES if (source.root / name).is_dir()]
    if left and states is None:
        warnings.append(
            f"{source.root}: {', '.join(left)} are left behind: they belong to the old topology. "
            "Start from the weights (model.init_method.path in config.yaml); nanotron-fast reshard "
            "takes the states along"
        )
    plan = Plan(
        direction="nanotron",
        source=source.root,
        family=model.family.name,
        model_class=model.model_class.name,
        spec=model.spec,
        topology=topology,
        dtype=main_dtype_of(stored_params, reader),
        num_parameters=count_parameters(params),
        layer_stages=stages.layers,
        other_stages=stages.others,
        transfer=MovePlan(tuple(reader.files.paths), tuple(writer.outputs), tuple(moves)),
        documents=documents,
        copies=copies,
        must_be_equal=tuple(copies_of_heads),
        source_topology=Topology(tp=source.tp, pp=source.pp, ep=source.ep),
        warnings=tuple(warnings),
        ignored=source.ignored,
        left_behind=tuple(name for name in beside.left_behind if name.rstrip("/") not in _STATES),
        states=None if states is None else sizes,
        source_states=None if states is None else states.sizes,
        sources_read={**source.read, **({} if states is None else states.read_files)},
    )
    plan.check()
    return plan.for_ranks(options.ranks_only, writer.ranks)


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


def _states(source: NanotronCheckpoint, training: Training | None) -> TrainingStates | None:
    """Those that go along. Raises CheckpointError where there are some and they are not whole."""
    if training is None or not (source.root / OPTIMIZER).is_dir():
        return None
    states = TrainingStates.read(source.root)
    check_beside_weights(states.found, source)
    return states


def _sizes(
    topology: Topology,
    metadata: Mapping[str, Any],
    states: TrainingStates | None,
    training: Training,
) -> Sizes:
    """The groups of ranks to write for. Raises ConfigError, TopologyError."""
    if states is None and training.zero_stage is not None:
        raise ConfigError(
            f"--zero-stage {training.zero_stage}: the checkpoint has no states of an optimizer"
        )
    stored = metadata.get("dp")
    dp = stored if isinstance(stored, int) and stored > 0 else 1
    zero_stage = 0
    if states is not None:
        zero_stage = states.sizes.zero_stage
        dp = states.sizes.dp
    if training.dp is not None:
        dp = training.dp
    # Weights alone are of no number of data-parallel ranks, unless one is given.
    if dp % topology.ep and (states is not None or training.dp is not None):
        raise TopologyError(
            f"ep={topology.ep} does not divide dp={dp}, inside of which experts are split over "
            f"ranks: choose --dp {-(-dp // topology.ep) * topology.ep}, or another multiple"
        )
    if training.zero_stage is not None:
        zero_stage = training.zero_stage
    return Sizes(topology.tp, topology.pp, dp, zero_stage, topology.ep)


def _rows_at(num_rows: int, tp: int, document: object) -> int:
    """Rows of the vocabulary at a topology: as many as there are, or as a trainer would add.

    The trainer makes them a multiple of make_vocab_size_divisible_by x tp, and removes none.
    """
    section = document.get("model") if isinstance(document, Mapping) else None
    given = section.get("make_vocab_size_divisible_by") if isinstance(section, Mapping) else None
    is_count = isinstance(given, int) and not isinstance(given, bool) and 0 < given < 1 << 20
    multiple = tp * (given if is_count and isinstance(given, int) else 1)
    return -(-num_rows // multiple) * multiple


def _batch_warnings(document: Mapping[str, Any], sizes: Sizes) -> list[str]:
    """What the user has to decide on: with other ranks a step sees another number of samples."""
    layout, tokens = document.get("parallelism"), document.get("tokens")
    was = layout.get("dp") if isinstance(layout, Mapping) else None
    key = "batch_accumulation_per_replica"
    count = tokens.get(key) if isinstance(tokens, Mapping) else None
    if not (isinstance(was, int) and isinstance(count, int)) or was == sizes.dp:
        return []
    total = was * count
    what = (
        f"{total // sizes.dp} keeps the batch as it was"
        if total % sizes.dp == 0
        else f"no {key} keeps the batch as it was"
    )
    return [
        f"{nanotron.CONFIG_YAML}: tokens.{key} stays {count}, so that a step takes "
        f"{sizes.dp}/{was} of the samples that it took; {what}"
    ]


def _going_on(
    training: Mapping[str, Any],
    sizes: Sizes,
    destination: str | Path,
    has_tokenizer: bool,
    num_rows: int,
) -> dict[str, Any]:
    """A training configuration at other ranks, which goes on from the new checkpoint."""
    document = _with_tokenizer(training, destination, has_tokenizer)
    ranks = {"tp": sizes.tp, "pp": sizes.pp, "dp": sizes.dp}
    _update(document, "parallelism", {**ranks, **_experts(document, sizes.ep)})
    optimizer = document.get("optimizer")
    stage = optimizer.get("zero_stage") if isinstance(optimizer, Mapping) else None
    if not (isinstance(stage, int) and min(stage, 1) == sizes.zero_stage):
        _update(document, "optimizer", {"zero_stage": sizes.zero_stage})
    model = document.get("model")
    config = model.get("model_config") if isinstance(model, Mapping) else None
    if isinstance(config, Mapping) and isinstance(config.get("vocab_size"), int):
        rows = max(num_rows, config["vocab_size"])
        _update(document, "model", {"model_config": {**config, "vocab_size": rows}})
    _update(document, "checkpoints", {"resume_checkpoint_path": str(destination)})
    return document


def _from_weights(
    training: Mapping[str, Any], topology: Topology, destination: str | Path, has_tokenizer: bool
) -> dict[str, Any]:
    """A training configuration at another topology, which starts from the new checkpoint."""
    document = _with_tokenizer(training, destination, has_tokenizer)
    ranks = {"tp": topology.tp, "pp": topology.pp}
    _update(document, "parallelism", {**ranks, **_experts(document, topology.ep)})
    _update(document, "model", {"init_method": {"path": str(destination)}})
    checkpoints = document.get("checkpoints")
    if isinstance(checkpoints, Mapping) and checkpoints.get("resume_checkpoint_path") is not None:
        # It would look there for optimizer states of this topology, which there are none of.
        _update(document, "checkpoints", {"resume_checkpoint_path": None})
    return document


def _experts(document: Mapping[str, Any], ep: int) -> dict[str, int]:
    """What a configuration says of expert parallelism: nothing, where there is none."""
    key, section = "expert_parallel_size", document.get("parallelism")
    is_told = isinstance(section, Mapping) and key in section
    return {key: ep} if is_told or ep > 1 else {}


def _with_tokenizer(
    training: Mapping[str, Any], destination: str | Path, has_tokenizer: bool
) -> dict[str, Any]:
    document = dict(training)
    if has_tokenizer:
        _update(document, "tokenizer", {"tokenizer_name_or_path": str(destination)})
    return document


def _update(document: dict[str, Any], section: str, values: Mapping[str, Any]) -> None:
    """Changes keys of a section, where it is there."""
    found = document.get(section)
    if isinstance(found, Mapping):
        document[section] = {**found, **values}


def _compact(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode()


def _indented(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True).encode()


def _yaml(document: Mapping[str, Any]) -> bytes:
    import yaml

    return str(yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)).encode()
