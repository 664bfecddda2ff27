"""Why a tensor is not found, or has no place: names, and what they say."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from nanotron_fast.checkpoints.options import IGNORE_HINT
from nanotron_fast.units import count

# Prefixes, what puts each there, and what to save instead.
_PREFIXES = {
    "_orig_mod.": "torch.compile puts it there: save what it wraps, model._orig_mod",
    "module.": "DistributedDataParallel puts it there: save what it wraps, model.module",
    "_fsdp_wrapped_module.": "FSDP puts it there: save the model's full state dict",
    "base_model.model.": "peft puts it there: save model.merge_and_unload()",
    "pretrained_model.": (
        "TRL's models with a value head put it there: save model.pretrained_model"
    ),
    "model.language_model.": "a multimodal model puts it there: save its language model alone",
    "language_model.": "a multimodal model puts it there: save its language model alone",
    "transformer.": "another class than that of config.json's model_type puts it there",
}
_ROOT = "model."
# The first number in a name is that of its layer: model.layers.3.mlp.experts.0.up_proj.weight.
_LAYER = re.compile(r"(?P<stack>.+?)\.(?P<number>[0-9]{1,9})\.")
_UNMERGED = (".base_layer.", ".lora_A.", ".lora_B.")


def explain(names: Collection[str], wanted: Iterable[str], ignored: Collection[str]) -> str:
    """What to do about a tensor that is missing under every name `wanted`; maybe nothing: ""."""
    wanted = tuple(wanted)
    for name in wanted:
        if name in ignored:
            return "; --ignore-tensors leaves it out, and it cannot be done without"
    if any(part in name for name in names for part in _UNMERGED):
        return (
            "; the layers of an adapter (LoRA) are not merged: save what model.merge_and_unload() "
            "returns"
        )
    for name in wanted:
        if name.removeprefix(_ROOT) in names:
            return (
                f"; {name.removeprefix(_ROOT)} is there, without {_ROOT!r} before it: the model "
                "was saved without its head, or its names were changed. Load it in transformers "
                "with the CausalLM class of its kind, check that no weight is new, and save that"
            )
        prefix = _prefix(names, name)
        if prefix is not None:
            known = next((key for key in _PREFIXES if prefix.startswith(key)), None)
            what = _PREFIXES[known] if known else "take it off every name, and save the model anew"
            return f"; names begin with {prefix!r}, which transformers does not expect. {what}"
    return ""


def about_left_over(
    left: Collection[str],
    used: Iterable[str],
    *,
    num_layers: int,
    num_predicting: int,
    config: str,
) -> str:
    """What to do about tensors without a place.

    Args:
        left: their names.
        used: those of the tensors that have one.
        num_layers: of the model, as the file `config` has it.
        num_predicting: layers that it says follow them, to predict later tokens.
    """
    stacks = {match["stack"] for match in map(_LAYER.match, used) if match is not None}
    layers = {
        (int(match["number"]), f"{match['stack']}.{match['number']}.")
        for match in map(_LAYER.match, left)
        if match is not None and match["stack"] in stacks and int(match["number"]) >= num_layers
    }
    if not layers:
        return IGNORE_HINT
    if len(layers) != num_predicting:
        there = 1 + max(number for number, _ in layers)
        has = f"{config} has {count(num_layers, 'layer')}"
        return f"{has}, and the files have {there}: one of them is wrong"
    prefixes = [prefix for _, prefix in sorted(layers)]
    if not all(name.startswith(tuple(prefixes)) for name in left):
        return IGNORE_HINT
    globs = " ".join(f"--ignore-tensors '{prefix}*'" for prefix in prefixes)
    return (
        f"{config} has {num_layers} layers, and those beyond them predict later tokens (MTP), "
        f"which no model here does. {globs} leaves them out"
    )


def _prefix(names: Collection[str], wanted: str) -> str | None:
    """What stands before the wanted name, or before its rest after `model.`."""
    for ending in (wanted, wanted.removeprefix(_ROOT)):
        for name in names:
            if not name.endswith(f".{ending}"):
                continue
            prefix = name[: -len(ending)]
            num_with = sum(each.startswith(prefix) for each in names)
            # Every right name but the head's begins with `model.`.
            is_right = prefix == _ROOT and not ending.startswith(_ROOT)
            if not is_right and 2 * num_with > len(names):
                return prefix
    return None
