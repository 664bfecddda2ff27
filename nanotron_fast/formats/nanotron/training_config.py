"""The `config.yaml` that Nanotron's run_train.py can start from.

Nanotron reads it with unknown keys fatal and types strict: a float field given as `1e-05` is text
to its YAML parser, one given as `10000` an integer. Fields are those of nanotron/config/config.py
at 2411b022; version 1.2 (PyPI's 0.4) has an older set. Training settings are placeholders to edit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

_LEARNING_RATE = {
    "learning_rate": 0.0003,
    "lr_decay_starting_step": None,
    "lr_decay_steps": 98,
    "lr_decay_style": "cosine",
    "lr_warmup_steps": 2,
    "lr_warmup_style": "linear",
    "min_decay_lr": 1.0e-05,
}
_ADAM = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1.0e-08,
    "torch_adam_is_fused": True,
}
_OPTIMIZER = {
    "clip_grad": 1.0,
    "learning_rate_scheduler": _LEARNING_RATE,
    "weight_decay": 0.01,
    "zero_stage": 0,
}
_DATA = {"dataset": None, "num_loading_workers": 1, "seed": 42}
_MAX_SEQUENCE_LENGTH = 4096


def training_config(
    model_config: Mapping[str, Any],
    *,
    root: str | Path,
    dtype: str,
    tp: int,
    pp: int,
    version: str,
    tokenizer: str | None,
) -> bytes:
    """The document's bytes. `root` is where the checkpoint will lie; `dtype` torch's name."""
    import yaml

    is_1_2 = version == "1.2"
    sequence_length = min(int(model_config["max_position_embeddings"]), _MAX_SEQUENCE_LENGTH)
    document: dict[str, Any] = {
        "checkpoints": {
            "checkpoint_interval": 100,
            "checkpoints_path": "checkpoints",
            "checkpoints_path_is_shared_file_system": False,
            "resume_checkpoint_path": None,
            "save_initial_state": False,
        },
        "general": {
            "ignore_sanity_checks": True,
            "project": "nanotron",
            "run": PurePath(root).name,
            "seed": 42,
        },
        "logging": {
            "iteration_step_info_interval": 1,
            "log_level": "info",
            "log_level_replica": "warning",
        },
        "model": {
            "ddp_bucket_cap_mb": 25,
            "dtype": dtype,
            "init_method": {"path": str(root)},
            "make_vocab_size_divisible_by": 1,
            "model_config": dict(model_config),
        },
        "parallelism": {
            "dp": 1,
            "expert_parallel_size": 1,
            "pp": pp,
            "pp_engine": "1f1b",
            "tp": tp,
            "tp_linear_async_communication": False,
            "tp_mode": "ALL_REDUCE",
        },
        "tokenizer": {
            "tokenizer_max_length": None,
            "tokenizer_name_or_path": tokenizer,
            "tokenizer_revision": None,
        },
        "tokens": {
            "batch_accumulation_per_replica": 1,
            "limit_test_batches": 0,
            "limit_val_batches": 0,
            "micro_batch_size": 1,
            "sequence_length": sequence_length,
            "train_steps": 100,
            "val_check_interval": -1,
        },
    }
    # Nanotron refuses to accumulate in fp32 what is fp32 already.
    optimizer = {**_OPTIMIZER, "accumulate_grad_in_fp32": dtype != "float32"}
    if is_1_2:
        document["optimizer"] = {**optimizer, **_ADAM}
        document["data"] = dict(_DATA)
    else:
        document["optimizer"] = {**optimizer, "optimizer_factory": {**_ADAM, "name": "adamW"}}
        document["data_stages"] = [
            {
                "data": dict(_DATA),
                "name": "Stable Training Stage",
                "sequence_length": sequence_length,
                "start_training_step": 1,
            }
        ]
        document["parallelism"] |= {"context_parallel_size": 1, "tp_recompute_allgather": True}
    text = yaml.safe_dump(document, default_flow_style=False, allow_unicode=True)
    return str(text).encode()
