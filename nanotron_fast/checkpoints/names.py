"""Why a tensor is not found: names under a prefix that another program put before them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

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
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
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


def layers_beyond(names: Iterable[str], num_layers: int) -> str | None:
    """How to leave out tensors of layers that follow a model's own; None where others are left."""
    found = [_LAYER.match(name) for name in names]
    numbers = sorted({int(match[1]) for match in found if match is not None})
    if None in found or not numbers or numbers[0] < num_layers:
        return None
    globs = " ".join(f"--ignore-tensors 'model.layers.{number}.*'" for number in numbers)
    return (
        f"config.json has {num_layers} layers, and those beyond them predict later tokens (MTP), "
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
