"""Configurations written for Nanotron 0.4 (PyPI's, checkpoint version 1.2), read as today's.

They have one `data` section instead of stages, the constants of AdamW beside `zero_stage`, and a
Llama that always rotates neighbours.
"""

from __future__ import annotations

from typing import Any

_ADAM = ("adam_eps", "adam_beta1", "adam_beta2", "torch_adam_is_fused")
STAGE_NAME = "Stable Training Stage"


def modernise(document: dict[str, Any], file: str) -> tuple[dict[str, Any], list[str]]:
    """Today's form of a document of either age, and a warning where it was the older."""
    optimizer = document.get("optimizer")
    has_flat_adam = (
        isinstance(optimizer, dict)
        and "optimizer_factory" not in optimizer
        and any(key in optimizer for key in _ADAM)
    )
    has_data = "data" in document and "data_stages" not in document
    if not has_flat_adam and not has_data:
        return document, []
    modern = {key: value for key, value in document.items() if key != "data"}
    if has_data:
        modern["data_stages"] = [
            {"name": STAGE_NAME, "start_training_step": 1, "data": document["data"]}
        ]
    if isinstance(optimizer, dict) and has_flat_adam:
        adam = {key: optimizer[key] for key in _ADAM if key in optimizer}
        rest = {key: value for key, value in optimizer.items() if key not in _ADAM}
        modern["optimizer"] = {"optimizer_factory": {**adam, "name": "adamW"}, **rest}
    model = document.get("model")
    config = model.get("model_config") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(config, dict) and config.get("is_llama_config"):
        modern["model"] = {**model, "model_config": {"rope_interleaved": True, **config}}
    return modern, [
        f"{file}: written for Nanotron 0.4, and read as the same of today's Nanotron; the "
        "checkpoints are today's too, and 0.4 does not resume them"
    ]
