"""Nanotron's YAML: its sections as frozen dataclasses, read strictly and written exactly."""

from nanotron_fast.train.config.data import (
    Data,
    Dataset,
    DataStage,
    HfDataset,
    Nanoset,
    SftDataset,
)
from nanotron_fast.train.config.names import run_name
from nanotron_fast.train.config.optimizer import AdamW, LearningRate, Muon, Optimizer
from nanotron_fast.train.config.sections import (
    CheckpointInit,
    Checkpoints,
    General,
    Logging,
    Model,
    MupInit,
    Parallelism,
    RandomInit,
    Tokenizer,
    Tokens,
)
from nanotron_fast.train.config.training_config import TrainingConfig, with_ours

__all__ = [
    "AdamW",
    "CheckpointInit",
    "Checkpoints",
    "Data",
    "DataStage",
    "Dataset",
    "General",
    "HfDataset",
    "LearningRate",
    "Logging",
    "Model",
    "Muon",
    "MupInit",
    "Nanoset",
    "Optimizer",
    "Parallelism",
    "RandomInit",
    "SftDataset",
    "Tokenizer",
    "Tokens",
    "TrainingConfig",
    "run_name",
    "with_ours",
]
