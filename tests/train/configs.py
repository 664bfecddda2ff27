"""A small training configuration to change, as a document and as a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from nanotron_fast.train import TrainingConfig

MODEL_CONFIG: dict[str, Any] = {
    "is_llama_config": True,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
DOCUMENT: dict[str, Any] = {
    "general": {"project": "test"},
    "parallelism": {"dp": 1, "pp": 1, "tp": 1},
    "model": {"model_config": MODEL_CONFIG, "init_method": {"std": 0.02}},
    "checkpoints": {"checkpoints_path": "run", "checkpoint_interval": 10},
    "tokens": {
        "sequence_length": 32,
        "train_steps": 20,
        "micro_batch_size": 2,
        "batch_accumulation_per_replica": 4,
    },
    "optimizer": {
        "optimizer_factory": {
            "name": "adamW",
            "adam_eps": 1e-8,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "torch_adam_is_fused": True,
        },
        "zero_stage": 0,
        "weight_decay": 0.01,
        "clip_grad": 1.0,
        "accumulate_grad_in_fp32": True,
        "learning_rate_scheduler": {"learning_rate": 3e-4},
    },
    "data_stages": [
        {"name": "only", "start_training_step": 1, "data": {"dataset": None, "seed": None}}
    ],
}


def document(**changes: Any) -> dict[str, Any]:
    """The document with values at other paths; `tokens__train_steps=5`, ... leaves a key out."""
    result = copy.deepcopy(DOCUMENT)
    for path, value in changes.items():
        *parents, last = path.split("__")
        holder: Any = result
        for key in parents:
            holder = holder[int(key)] if key.isdecimal() else holder.setdefault(key, {})
        if value is ...:
            del holder[last]
        else:
            holder[last] = value
    return result


def save(path: Path, **changes: Any) -> Path:
    """Writes the document; returns the path."""
    import yaml  # here alone: what a run on a GPU needs of this module does without

    path.write_text(yaml.safe_dump(document(**changes)))
    return path


def read(**changes: Any) -> TrainingConfig:
    """The configuration that the document is; errors call it x.yaml."""
    return TrainingConfig.from_dict(document(**changes), name="x.yaml")
