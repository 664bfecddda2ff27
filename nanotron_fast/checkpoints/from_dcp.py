"""A folder of torch.distributed.checkpoint as a model that is published.

The weights of its model are found among what else a training saves, and get the names that Hugging
Face gives them. Its configuration lies in the folder or is named by the user: DCP keeps none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanotron_fast.errors import CheckpointError
from nanotron_fast.families import torchtitan
from nanotron_fast.formats.dcp import METADATA
from nanotron_fast.formats.dcp.checkpoint import DcpCheckpoint, read_dcp
from nanotron_fast.formats.huggingface.checkpoint import (
    CONFIG,
    GENERATION_CONFIG,
    HfCheckpoint,
    StoredTensor,
)
from nanotron_fast.formats.huggingface.files import EXPLICIT
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron import side_file
from nanotron_fast.formats.nanotron.side_file import read_side_file
from nanotron_fast.formats.safetensors import TensorInfo
from nanotron_fast.moves.dtypes import SAFETENSORS_BITS
from nanotron_fast.units import first_few

_HF_EMBEDDING = "model.embed_tokens.weight"
# Segments of a name that wrappers of modules put into it.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# What lies beside a model whose own names have no prefix.
_STATES = frozenset(
    (
        *("optimizer", "optimizers", "optim", "lr_scheduler", "lr_schedulers", "scheduler"),
        *("dataloader", "train_state", "rng", "rng_state", "ema", "step", "ft_manager"),
    )
)
_SHOWN = 5
# Of a name, in a message that shows several.
_MAX_LETTERS = 80


class _Weight(NamedTuple):
    """A tensor of the model: Hugging Face's name, and the one that it is saved under."""

    name: str
    saved: str


def read_dcp_model(root: Path, like: Path | None) -> HfCheckpoint:
    """Reads a folder of DCP. `like` is one that has the model's configuration.

    Raises CheckpointError where there is no model in it, or where files do not hold what
    `.metadata` says of the model's weights; OSError.
    """
    saved = read_dcp(root)
    prefix, is_torchtitan = _layout(saved)
    weights, left = _weights(saved, prefix, is_torchtitan)
    located = saved.locate(weight.saved for weight in weights)
    tensors: dict[str, StoredTensor] = {}
    for name, original in weights:
        tensor = saved.tensors[original]
        if tensor.dtype not in SAFETENSORS_BITS:
            raise CheckpointError(
                f"{root / METADATA}: {original} is of the type {tensor.dtype}, which is not read"
            )
        if name in tensors:
            raise CheckpointError(f"{root / METADATA}: two tensors are {name}, one is {original}")
        info = TensorInfo(tensor.dtype, tensor.shape, 0, 0)
        tensors[name] = StoredTensor(root / METADATA, info, located.chunks[original])
    config, generation_config, lacks = _configuration(root, like)
    files = {chunk.place.file for tensor in saved.tensors.values() for chunk in tensor.chunks}
    return HfCheckpoint(
        root,
        config,
        generation_config,
        tensors,
        warnings=_beside(root, (*left, *saved.others)),
        format="dcp",
        rope_interleaved=is_torchtitan,
        configured_by=like,
        lacks_config=lacks,
        other_files=frozenset((METADATA, *files)),
        read=located.read,
    )


def _layout(saved: DcpCheckpoint) -> tuple[str, bool]:
    """What stands before the names of the model's weights, and whether torchtitan gave them.

    Raises CheckpointError where there is no model, or several.
    """
    found: dict[str, bool] = {}
    for name in saved.tensors:
        plain = _without_wrappers(name)
        for embedding in (_HF_EMBEDDING, torchtitan.EMBEDDING):
            prefix = plain.removesuffix(embedding)
            if prefix != plain and (not prefix or prefix.endswith(".")):
                found[prefix] = embedding == torchtitan.EMBEDDING
    if not found:
        shown = ", ".join(name[:_MAX_LETTERS] for name in sorted(saved.tensors)[:_SHOWN])
        raise CheckpointError(
            f"{saved.root / METADATA}: no tensor is called {_HF_EMBEDDING} or "
            f"{torchtitan.EMBEDDING}, whatever stands before it, so that there is no model with "
            f"Hugging Face's or torchtitan's names. It holds {len(saved.tensors)} tensors"
            f"{f', as {shown}' if shown else ''}"
        )
    if len(found) > 1:
        shown = ", ".join(repr(prefix[:_MAX_LETTERS]) for prefix in sorted(found)[:_SHOWN])
        raise CheckpointError(
            f"{saved.root / METADATA}: it holds {len(found)} models, whose names begin with "
            f"{shown}: save one of them alone"
        )
    return found.popitem()


def _weights(
    saved: DcpCheckpoint, prefix: str, is_torchtitan: bool
) -> tuple[list[_Weight], list[str]]:
    """The weights of the model, and the names of the tensors beside it.

    What is not known to lie beside a model and has no name of Hugging Face's keeps its own: where
    the model has no place for it, that is said later.
    """
    weights: list[_Weight] = []
    left: list[str] = []
    for saved_name in saved.tensors:
        plain = _without_wrappers(saved_name)
        name = plain.removeprefix(prefix)
        is_beside = not plain.startswith(prefix) or (
            not prefix and plain.partition(".")[0] in _STATES
        )
        if is_beside:
            left.append(saved_name)
        elif not is_torchtitan:
            weights.append(_Weight(name, saved_name))
        elif not torchtitan.is_buffer(name):
            weights.append(_Weight(torchtitan.hf_name(name) or name, saved_name))
    return weights, left


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _configuration(
    root: Path, like: Path | None
) -> tuple[dict[str, Any], dict[str, Any] | None, str | None]:
    """config.json, generation_config.json, and why there are none. Raises CheckpointError."""
    where = root if like is None else like
    config: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] | None = None
    side = read_side_file(where)
    if (where / CONFIG).is_file():
        config = read_json_object(where / CONFIG)
        path = where / GENERATION_CONFIG
        generation = read_json_object(path) if path.is_file() else None
    elif side is not None:
        config, generation = side.config, side.generation_config
    if config is not None:
        kept = {key: value for key, value in config.items() if key != EXPLICIT}
        return kept, None if generation is None else dict(generation), None
    if like is not None:
        raise CheckpointError(f"--like {like}: it has no {CONFIG} and no {side_file.NAME}")
    return (
        {},
        None,
        f"{root}: no {CONFIG} lies in it, as in most folders of torch.distributed.checkpoint: "
        "--like DIR_OR_ID names a Hugging Face model of the same shape, whose configuration and "
        "tokenizer are taken",
    )


def _beside(root: Path, names: Iterable[str]) -> tuple[str, ...]:
    """A word on what lies beside the model."""
    counts = Counter(name.partition(".")[0][:_MAX_LETTERS] for name in names)
    if not counts:
        return ()
    told = [f"{name} ({count})" for name, count in counts.most_common()]
    return (
        f"{root}: {sum(counts.values())} entries beside the model's weights are left out: "
        f"{first_few(told)}",
    )
