"""What lies beside the weights in the checkpoints of a run: configurations, a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from nanotron_fast.checkpoints.plan.like import read_like
from nanotron_fast.checkpoints.source import resolve_companions
from nanotron_fast.formats.huggingface.checkpoint import CONFIG
from nanotron_fast.formats.huggingface.companions import companions
from nanotron_fast.formats.nanotron import side_file
from nanotron_fast.formats.nanotron.checkpoint import CONFIG_YAML, MODEL_CONFIG
from nanotron_fast.formats.nanotron.side_file import SideFile
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.train.architecture import ModelPlan
from nanotron_fast.train.checkpoint import Beside
from nanotron_fast.train.config import TrainingConfig
from nanotron_fast.version import __version__


def beside_of_run(config: TrainingConfig, model: ModelPlan, weights: Path | None) -> Beside:
    """Reads all of it into memory, since what it comes from may be gone before the run is.

    Args:
        model: that the configuration trains.
        weights: the folder that the run's weights come from; None for random ones.

    Raises CheckpointError, OSError.
    """
    full = model.model_config
    carried = _carried(config, weights)
    original = _original(weights)
    side = SideFile(
        tool_version=__version__,
        family=model.architecture.family.name,
        target=_target(model),
        dtype=_dtype(config).short_name,
        vocab_size=model.architecture.vocab_size,
        config=original.config if original else None,
        generation_config=original.generation_config if original else None,
        carried=sorted(carried),
        training=config.ours(),
    )
    documents = {
        **carried,
        MODEL_CONFIG: json.dumps(full).encode(),
        CONFIG_YAML: config.with_model_config(full).to_yaml().encode(),
        side_file.NAME: side.to_bytes(),
    }
    return Beside(documents, exports_hf=config.checkpoints.export_hf)


def _target(model: ModelPlan) -> str:
    """Whose the checkpoint is: what Nanotron by itself does not compute is this package's."""
    found = model.architecture
    is_ours = not found.model_class.is_stock or found.spec.rope_scaling is not None
    return "nanotron-fast" if is_ours else "nanotron"


def _dtype(config: TrainingConfig) -> Dtype:
    return next(each for each in Dtype if each.torch_name == config.model.dtype)


def _original(weights: Path | None) -> SideFile | None:
    """The Hugging Face configuration that the weights began with, where it is known."""
    if weights is None:
        return None
    has_one = (weights / CONFIG).is_file() or (weights / side_file.NAME).is_file()
    return read_like(weights, None) if has_one else None


def _carried(config: TrainingConfig, weights: Path | None) -> dict[str, bytes]:
    """The tokenizer that reads the text, or the one beside the weights, and what else is there."""
    others: dict[str, Path] = {}
    tokenizer: dict[str, Path] = {}
    if weights is not None:
        beside = companions(weights)
        others, tokenizer = beside.others, beside.tokenizer
    section = config.tokenizer
    if section is not None and section.tokenizer_name_or_path is not None:
        found = resolve_companions(
            section.tokenizer_name_or_path, revision=section.tokenizer_revision
        )
        tokenizer = companions(found).tokenizer or tokenizer
    return {path: file.read_bytes() for path, file in {**others, **tokenizer}.items()}
