"""Nanotron's YAML is read strictly, and written as Nanotron reads it."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

import nanotron_fast
from nanotron_fast.errors import ConfigError
from nanotron_fast.train import TrainingConfig
from nanotron_fast.train.architecture import architecture
from nanotron_fast.train.config import AdamW, HfDataset, Muon, Nanoset, SftDataset, run_name
from nanotron_fast.train.config.training_config import with_ours
from tests.modelzoo import make
from tests.train.configs import DOCUMENT, read, save

GOLDEN_YAML = "training/llama_tied_tp2_zero0/2/config.yaml"


def test_what_nanotron_wrote_comes_back_byte_for_byte(golden: Path) -> None:
    config = TrainingConfig.load(golden / GOLDEN_YAML)
    assert config.to_yaml() == (golden / GOLDEN_YAML).read_text()
    assert config.ours() == {}
    assert [*config.to_dict()] == [
        "general",
        "parallelism",
        "model",
        "tokenizer",
        "checkpoints",
        "logging",
        "metrics_logging",
        "tokens",
        "optimizer",
        "data_stages",
        "profiler",
        "lighteval",
        "s3_upload",
    ]
    # A second reading finds nothing more to fill in.
    assert TrainingConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("family", "version"),
    [
        ("llama", "1.5"),
        ("llama", "1.2"),
        ("mistral", "1.5"),
        ("qwen2", "1.5"),
        ("smollm3", "1.5"),
        ("qwen2_moe", "1.5"),
    ],
)
def test_what_a_conversion_writes_is_read(family: str, version: str, tmp_path: Path) -> None:
    source = make(family, sliding_window=...) if family == "mistral" else make(family)
    nanotron_fast.convert(
        source.save(tmp_path / "hf"), tmp_path / "nanotron", checkpoint_version=version
    )
    written = yaml.safe_load((tmp_path / "nanotron" / "config.yaml").read_text())
    config = TrainingConfig.load(tmp_path / "nanotron" / "config.yaml")
    if version == "1.2":
        assert "written for Nanotron 0.4" in config.warnings[0]
        # It had no other way to rotate then.
        assert config.model.model_config is not None
        assert config.model.model_config["rope_interleaved"] is True
        assert config.optimizer.optimizer_factory == AdamW(
            adam_eps=1e-8, adam_beta1=0.9, adam_beta2=0.95, torch_adam_is_fused=True
        )
        assert config.data_stages[0].sequence_length == written["tokens"]["sequence_length"]
    else:
        assert_holds(config.to_dict(), written)


def test_our_own_class_is_read_too(tmp_path: Path) -> None:
    """A model that no class of Nanotron's can hold, as its conversion writes it."""
    source = make("llama", head_dim=32).save(tmp_path / "hf")
    nanotron_fast.convert(source, tmp_path / "nanotron", target="nanotron-fast")
    stored = json.loads((tmp_path / "nanotron" / "model_config.json").read_text())
    assert stored["is_nanotron_fast_config"] is True
    config = read(model__model_config=stored, tokens__sequence_length=16)
    assert config.to_dict()["model"]["model_config"] == stored
    with pytest.raises(
        ConfigError, match=r"model.model_config.layerz is not known: did you mean l"
    ):
        read(model__model_config={**stored, "layerz": []})
    with pytest.raises(
        ConfigError, match=r"x.yaml: model.model_config.layers is .*a list of layer"
    ):
        read(model__model_config={**stored, "layers": 3})


def assert_holds(whole: Any, part: Any) -> None:
    """Everything of a document is in another, which may have more."""
    if isinstance(part, dict):
        for key, value in part.items():
            assert_holds(whole[key], value)
    else:
        assert whole == part


def test_defaults_are_those_that_nanotron_fills_in() -> None:
    config = read()
    assert config.general.seed == 42
    assert config.parallelism.pp_engine == "afab"
    assert config.parallelism.tp_mode == "ALL_REDUCE"
    assert config.model.dtype == "bfloat16"
    assert config.data_stages[0].data.seed == 42
    assert config.data_stages[0].sequence_length == 32
    rate = config.optimizer.learning_rate_scheduler
    assert (rate.lr_decay_steps, rate.min_decay_lr) == (20, 3e-4)
    assert config.model.model_config is not None
    assert config.model.model_config["rms_norm_eps"] == 1e-6
    assert config.global_batch_size == 8


def test_the_command_line_overrides(tmp_path: Path) -> None:
    path = save(tmp_path / "c.yaml")
    config = TrainingConfig.load(
        path,
        [
            "--tokens.train_steps=7",
            "data_stages.0.sequence_length=16",
            "--optimizer.learning_rate_scheduler.learning_rate=1e-4",
            "--optimizer.weight_decay_exclude_named_params=[.*norm.*, a=b]",
            "--metrics_logging.log_level=1",
            "--parallelism={dp: 2, pp: 1, tp: 1}",
            "--parallelism.tp=2",
            "--optimizer.clip_grad=null",
        ],
    )
    assert config.tokens.train_steps == 7
    assert config.data_stages[0].sequence_length == 16
    assert config.optimizer.learning_rate_scheduler.learning_rate == 1e-4
    assert config.optimizer.weight_decay_exclude_named_params == (".*norm.*", "a=b")
    assert config.metrics_logging is not None
    assert config.parallelism.world_size == 4
    assert config.optimizer.clip_grad is None


def test_zero_3_is_written_as_zero_1_whose_files_it_has() -> None:
    config = read(optimizer__zero_stage=3)
    assert config.to_dict()["optimizer"]["zero_stage"] == 1
    assert config.ours() == {"optimizer": {"zero_stage": 3}}
    assert TrainingConfig.from_dict(with_ours(config.to_dict(), config.ours())) == config


def test_our_keys_are_kept_apart() -> None:
    config = read(
        checkpoints__keep_last=2,
        checkpoints__export_hf=True,
        parallelism={"dp": 1, "pp": 2, "tp": 1, "pp_engine": "interleaved", "pp_chunks": 4},
        optimizer__optimizer_factory={"name": "Muon", "muon_momentum": 0.9},
    )
    assert config.optimizer.optimizer_factory == Muon(muon_momentum=0.9)
    assert config.parallelism.chunks == 4
    assert [
        warning.partition(", which Nanotron does not have")[0] for warning in config.warnings
    ] == [
        "x.yaml: parallelism.pp_engine is interleaved",
        "x.yaml: optimizer.optimizer_factory.name is muon",
    ]
    assert all("it cannot resume this run" in warning for warning in config.warnings)
    stock = config.to_dict()
    assert stock["parallelism"]["pp_engine"] == "1f1b"
    assert stock["optimizer"]["optimizer_factory"]["name"] == "adamW"
    text = yaml.safe_dump(stock)
    assert not re.search("keep_last|export_hf|pp_chunks|muon|: interleaved", text)
    assert config.ours() == {
        "checkpoints": {"keep_last": 2, "export_hf": True},
        "parallelism": {"pp_engine": "interleaved", "pp_chunks": 4},
        "optimizer": {
            "optimizer_factory": {
                "adam_eps": 1e-8,
                "adam_beta1": 0.9,
                "adam_beta2": 0.95,
                "torch_adam_is_fused": True,
                "name": "muon",
                "muon_momentum": 0.9,
                "muon_nesterov": True,
                "muon_ns_steps": 5,
            }
        },
    }
    # Nanotron's part alone is a configuration, and both together are this one again.
    assert TrainingConfig.from_dict(stock).ours() == {}
    assert TrainingConfig.from_dict(with_ours(stock, config.ours())) == config


def test_other_spellings() -> None:
    config = read(
        parallelism={"dp": 1, "pp": 1, "tp": 1, "pp_engine": "gpipe", "tp_mode": "reduce_scatter"}
    )
    assert (config.parallelism.pp_engine, config.parallelism.tp_mode) == ("afab", "REDUCE_SCATTER")


def test_datasets_are_told_apart() -> None:
    def dataset(**keys: Any) -> Any:
        config = read(
            data_stages__0__data__dataset=keys, tokenizer={"tokenizer_name_or_path": "somewhere"}
        )
        return config.data_stages[0].data.dataset

    text = dataset(hf_dataset_or_datasets={"a": 0.5, "b": 1})
    assert text == HfDataset(hf_dataset_or_datasets={"a": 0.5, "b": 1.0})
    assert text.text_column_name == "text"
    sft = dataset(hf_dataset_or_datasets="a", sft_dataloader=True, hf_dataset_splits=["x", "y"])
    assert sft == SftDataset(hf_dataset_or_datasets="a", hf_dataset_splits=("x", "y"))
    assert dataset(dataset_folder="a") == Nanoset(dataset_folder=("a",), dataset_weights=(1.0,))
    assert dataset(dataset_folder={"a": 0.8, "b": 0.2}) == Nanoset(
        dataset_folder=("a", "b"), dataset_weights=(0.8, 0.2)
    )
    assert dataset(dataset_folder=["a", "b"]).dataset_weights is None
    with pytest.raises(ConfigError, match="sft_dataloader is false, and should be true"):
        dataset(hf_dataset_or_datasets="a", sft_dataloader=False)


def test_stages_are_sorted_and_found_by_step() -> None:
    (stage,) = DOCUMENT["data_stages"]
    late = {**stage, "name": "late", "start_training_step": 11, "sequence_length": 64}
    config = read(data_stages=[late, stage])
    assert [each.name for each in config.data_stages] == ["only", "late"]
    assert [config.stage_at(step).name for step in (1, 10, 11, 20)] == ["only"] * 2 + ["late"] * 2
    with pytest.raises(ConfigError, match=r"data_stages.0.sequence_length is 640"):
        read(data_stages=[{**late, "sequence_length": 640}, stage])


@pytest.mark.parametrize(
    ("scaling", "room"),
    [
        # As transformers computes them: the first two are stretched, "dynamic" follows any length.
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 64}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, None),
        (
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            128,
        ),
    ],
)
def test_sequences_are_as_long_as_the_models_frequencies_reach(
    scaling: dict[str, Any], room: int | None
) -> None:
    """What is refused here is what `generate` refuses, too."""
    scaled = {"model__model_config__rope_scaling": scaling}
    length = room or 4096
    config = read(tokens__sequence_length=length, **scaled)
    assert max_positions_of(config) == room
    if room is None:
        return
    keys = "max_position_embeddings" + (" and rope_scaling" if room > 128 else "")
    message = (
        rf"tokens.sequence_length is {room + 1}, and the model has {room} positions "
        rf"\(model.model_config: {keys}\)"
    )
    with pytest.raises(ConfigError, match=message):
        read(tokens__sequence_length=room + 1, **scaled)


@pytest.mark.parametrize("number", ["4", float("inf"), float("nan"), 1e308, 10**400])
def test_a_scaling_without_a_number_is_named(number: Any) -> None:
    """Nor one that times the positions is infinite."""
    scaling = {"rope_type": "linear", "factor": number}
    told = re.escape(f"rope_scaling.factor is {number!r}, and should be a number below 2**31")
    with pytest.raises(ConfigError, match=told):
        read(model__model_config__rope_scaling=scaling)


def max_positions_of(config: TrainingConfig) -> int | None:
    return architecture(config).architecture.spec.max_positions


def test_an_architecture_without_a_marker_is_that_of_the_first_class_that_fits() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 8}
    llama, qwen2 = (
        read(model__model_config={**sizes, **more}).model.model_config
        for more in ({}, {"sliding_window_size": 16})
    )
    assert llama is not None
    assert qwen2 is not None
    assert llama["is_llama_config"] is True
    assert qwen2["is_qwen2_config"] is True
    assert llama["num_key_value_heads"] == 8
    experts = read(
        model__model_config={**sizes, "num_hidden_layers": 3, "moe_config": {"top_k": 1}}
    ).model.model_config
    assert experts is not None
    assert experts["moe_config"]["layers"] == [0, 1, 2]
    assert experts["moe_config"]["num_experts"] == 8


def test_the_name_of_a_run() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    assert run_name("a_%date_%jobid", now, {"SLURM_JOB_ID": "7"}) == "a_20260102_030405_7"
    assert run_name("%jobid", now, {}) == "local"
