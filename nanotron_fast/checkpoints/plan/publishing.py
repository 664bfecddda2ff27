"""The files of a model as it is published: Hugging Face's, or those of a folder of DCP."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanotron_fast.checkpoints.options import DEFAULT_SHARD_BYTES, Options
from nanotron_fast.checkpoints.plan.sides import TIED_HEAD, PublishedTarget
from nanotron_fast.errors import UnsupportedModelError
from nanotron_fast.families import Family, torchtitan
from nanotron_fast.families.parts import Param
from nanotron_fast.formats.dcp import METADATA
from nanotron_fast.formats.huggingface import checkpoint as hf
from nanotron_fast.moves.dtypes import Dtype

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Published:
    """Where the tensors go, and the small files that say so."""

    target: PublishedTarget
    documents: Mapping[str, Callable[[], bytes]]


def is_interleaved(to: str, names: str) -> bool:
    """Whether tensors get rotary pairs beside each other. `to`: "hf" or "dcp"."""
    return to == "dcp" and names in torchtitan.NAMINGS


def publish(
    params: Sequence[Param],
    dtypes: Mapping[str, Dtype],
    family: Family,
    to: str,
    options: Options,
) -> Published:
    """Lays out what a model is published as. `to`: "hf" or "dcp"; dtypes by Hugging Face's names.

    Raises UnsupportedModelError where torchtitan has no name for a tensor.
    """
    shapes = {part.name: part.tensors[0].shape for param in params for part in param.parts}
    max_bytes = options.max_shard_size or DEFAULT_SHARD_BYTES
    if to == "hf":
        tensors = [(name, dtypes[name], shape) for name, shape in shapes.items()]
        files, index = hf.layout_shards(tensors, max_bytes)
        documents = {} if index is None else {hf.INDEX: partial(bytes, index)}
        return Published(PublishedTarget(files, dtypes), documents)
    from nanotron_fast.formats.dcp.writing import layout_dcp

    is_tied = TIED_HEAD not in shapes
    names = {name: _names(name, family, options.names, is_tied) for name in shapes}
    dcp_files, metadata = layout_dcp(
        [(each, dtypes[name], shapes[name]) for name in shapes for each in names[name]], max_bytes
    )
    target = PublishedTarget(dcp_files, dtypes, names)
    return Published(target, {METADATA: partial(bytes, metadata)})


def _names(name: str, family: Family, naming: str, is_tied: bool) -> tuple[str, ...]:
    """Those of a tensor in a folder of DCP.

    Of a tied model the head is there as well: the state of a module that is loaded lists it.
    """
    wanted = (name, TIED_HEAD) if is_tied and name == _EMBEDDING else (name,)
    if naming == "hf":
        return wanted
    if family.name != torchtitan.MODEL_TYPE:
        raise UnsupportedModelError(
            f"--names {naming}: torchtitan's names are those of a {torchtitan.MODEL_TYPE}, and the "
            f"model is a {family.name}"
        )
    found = [torchtitan.torchtitan_name(each, naming) for each in wanted]
    if None in found:
        raise UnsupportedModelError(f"--names {naming}: torchtitan's models have no {name}")
    return tuple(each for each in found if each is not None)


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """A configuration as transformers writes it."""
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
