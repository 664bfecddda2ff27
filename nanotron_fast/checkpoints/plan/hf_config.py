"""The `config.json` of a Nanotron checkpoint: the source's own, with what Nanotron computes now.

Where the checkpoint computes what the source did, that is the source's, key for key. What the
checkpoint computes decides: a key of the source that says otherwise is changed, or taken out, with
a warning; and what is written must read as the checkpoint's own model, or the conversion ends with
an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from nanotron_fast.checkpoints.plan.like import TOKEN_KEYS
from nanotron_fast.checkpoints.stored import NanotronModel
from nanotron_fast.errors import CheckpointError, NanotronFastError
from nanotron_fast.families import family_of_config
from nanotron_fast.families.hf_config import read_config, write_config
from nanotron_fast.families.unknown_fields import UNKNOWN_FIELDS
from nanotron_fast.formats.nanotron import side_file
from nanotron_fast.formats.nanotron.checkpoint import MODEL_CONFIG
from nanotron_fast.model.spec import COMPUTED, ModelSpec, differing_layer
from nanotron_fast.moves.dtypes import Dtype

# What Nanotron's classes keep otherwise than config.json does: one token id for a list, a default
# for what they have no field for. None of it changes what a model computes.
_KEPT_OTHERWISE = (*TOKEN_KEYS, "initializer_range", "use_cache", "extras")
# What rope_parameters may hold, of keys that transformers 4 has beside rope_scaling: by those keys.
_IN_ROPE: Mapping[str, str] = {
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
    "rotary_emb_base": "rope_theta",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
# They list layers one by one, and are made anew when the layers or their windows change.
_BY_LAYER = "layer_types"
# Written by families that need them alone; the others have rope_theta and rope_scaling.
_ROPE = ("rope_parameters", "rope_local_base_freq")
_SAYS_ROPE = (*_ROPE, "rope_theta", "rope_scaling", *_IN_ROPE)


def hf_config(model: NanotronModel, dtype: Dtype) -> tuple[dict[str, Any], list[str]]:
    """The document, and warnings. Raises CheckpointError."""
    written = write_config(model.family, model.spec, dtype)
    unknown = {UNKNOWN_FIELDS: model.unknown_fields} if model.unknown_fields else {}
    side = model.side
    if side is None or side.config is None or side.family != model.family.name:
        config = {**written, **unknown}
        _check(config, model, model.spec)
        return config, []
    where = f"--like {model.like}" if model.like else model.checkpoint.root / side_file.NAME
    try:
        original = read_config(family_of_config(side.config, model.family.name), side.config)
    except NanotronFastError as error:
        raise CheckpointError(f"{where}: the source's {error}") from None
    config = dict(side.config)
    config.pop(UNKNOWN_FIELDS, None)
    config.update(unknown)
    _say_dtype(config, dtype, side.dtype)
    for key in ("architectures", "model_type"):
        if config.get(key) is None:
            config[key] = written[key]
    kept = _as_nanotron_keeps(original, model)
    was = write_config(model.family, kept, dtype)
    if any(was.get(key) != written.get(key) for key in _SAYS_ROPE):
        _say_rope(config, was, model, original.rope_theta)
    warnings = _update(config, was, written, model)
    _check(config, model, _expected(original, kept, model))
    return config, warnings


def _say_dtype(config: dict[str, Any], dtype: Dtype, was: str | None) -> None:
    """Says it by the key that the source has; by none where it has none, and is still right."""
    said = [key for key in ("dtype", "torch_dtype") if config.get(key) is not None]
    if not said and dtype.short_name != was:
        said = ["torch_dtype"]
    for key in said:
        if str(config.get(key)).removeprefix("torch.") != dtype.torch_name:
            config[key] = dtype.torch_name


def _say_rope(
    config: dict[str, Any], was: Mapping[str, Any], model: NanotronModel, rope_theta: float
) -> None:
    """Says what the source does of the rotary embedding by keys that all versions read."""
    within = config.get("rope_parameters") or {}
    for key in _ROPE:
        config.pop(key, None)
    if "rope_theta" in was:
        config["rope_theta"] = rope_theta
    if was.get("rope_scaling") is not None or "rope_scaling" in config:
        config["rope_scaling"] = was.get("rope_scaling")
    # As the source has it: what is computed may be said by several numbers.
    for key, inner in _IN_ROPE.items():
        said = within.get(inner)
        is_told = key in was and said not in (None, model.family.defaults.get(inner))
        if is_told and config.get(key) is None:
            config[key] = said
    config.update({key: was[key] for key in _ROPE if key in was})


def _update(
    config: dict[str, Any], was: Mapping[str, Any], written: Mapping[str, Any], model: NanotronModel
) -> list[str]:
    """Changes what the source's config says otherwise than the checkpoint does."""
    warnings: list[str] = []
    changed = [key for key, value in written.items() if was.get(key) != value]
    for key in changed:
        value = written[key]
        if model.like is not None and key in TOKEN_KEYS:
            warnings.append(
                f"config.json: {key} is {config.get(key)!r} as in --like {model.like}; "
                f"{MODEL_CONFIG} has {value!r}"
            )
            continue
        warnings.append(
            f"config.json: {key} is {value!r} as in {MODEL_CONFIG}; it was "
            f"{was.get(key)!r} in the model that this one was made from"
        )
        config[key] = value
        for name in model.family.aliases.get(key, ()):
            if config.get(name) is not None:
                config[name] = value
        inner = config.get("text_config")
        if isinstance(inner, dict) and inner.get(key) is not None:
            config["text_config"] = {**inner, key: value}
    gone = [key for key in was if key not in written]
    if {"sliding_window", "use_sliding_window", "num_hidden_layers"} & {*changed}:
        gone += [] if _BY_LAYER in written else [_BY_LAYER]
    for key in dict.fromkeys(gone):
        if config.pop(key, None) is not None:
            warnings.append(
                f"config.json: {key} is left out: what it says of the layers is not so in "
                f"{MODEL_CONFIG}"
            )
    return warnings


def _as_nanotron_keeps(spec: ModelSpec, model: NanotronModel) -> ModelSpec:
    """A spec with what a trip through model_config.json makes of it, the model's sense unchanged.

    A class may lack a field for what a model computes. That stays: the checkpoint does not compute
    it, and so differs.
    """
    config = model.model_class.write(
        spec, family=model.family.name, version="1.5", rope_interleaved=model.is_interleaved
    )
    trip = model.model_class.read(config, head_dim=spec.head_dim)
    return replace(spec, **{name: getattr(trip, name) for name in _KEPT_OTHERWISE})


def _expected(original: ModelSpec, kept: ModelSpec, model: NanotronModel) -> ModelSpec:
    """What config.json should read as: the checkpoint's, but for what Nanotron has no place for."""
    spec = model.spec
    same = {
        name: getattr(original, name)
        for name in _KEPT_OTHERWISE
        if getattr(kept, name) == getattr(spec, name)
        or (model.like is not None and name in TOKEN_KEYS)
    }
    return replace(spec, **same)


def _check(config: Mapping[str, Any], model: NanotronModel, expected: ModelSpec) -> None:
    """Reads what is to be written. Raises CheckpointError where it is another model."""
    root = model.checkpoint.root
    try:
        found = read_config(family_of_config(config, model.family.name), config)
    except NanotronFastError as error:
        raise CheckpointError(
            f"{root}: what {MODEL_CONFIG} says cannot be written as a {model.family.name}'s: "
            f"{error}"
        ) from None
    for name in dict.fromkeys((*COMPUTED, *(field.name for field in fields(ModelSpec)))):
        left, right = getattr(found, name), getattr(expected, name)
        # Each side keeps what it has a place for, such as rates of dropout.
        if name != "extras" and left != right:
            if name == "layers":
                name, left, right = differing_layer(found, expected) or (name, left, right)
            raise CheckpointError(
                f"{root}: {name} is {right!r} in {MODEL_CONFIG}, and the config.json made from it "
                f"would say {left!r}; --family names another class that may hold it"
            )
