"""What is no configuration, or cannot be served, or has no effect, is named with the reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanotron_fast.errors import ConfigError, TopologyError
from nanotron_fast.train import TrainingConfig
from nanotron_fast.train.config.checks import check_world_size
from tests.train.configs import DOCUMENT, document, read, save


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens__train_step": 5}, "x.yaml: tokens.train_step is not known: did you mean train_s"),
        ({"extra": {}}, "x.yaml: extra is not known: there are general, parallelism, model"),
        ({"general__project": ...}, "x.yaml: general.project is missing, and should be text"),
        (
            {"optimizer": ...},
            "x.yaml: optimizer is missing, and should be a mapping with optimizer_",
        ),
        (
            {"model__model_config__hiden_size": 64},
            "model.model_config.hiden_size is not known: did you mean hidden_size?",
        ),
        (
            {"model__model_config__hidden_size": "64"},
            "x.yaml: model.model_config.hidden_size is '64', and should be an integer",
        ),
        (
            {"data_stages__0__data__seed": ...},
            "data_stages.0.data.seed is missing, and should be an integer",
        ),
        ({"tokens__train_steps": "5"}, "tokens.train_steps is '5', and should be an integer of at"),
        ({"tokens__train_steps": True}, "tokens.train_steps is true, and should be an integer"),
        (
            {"tokens__train_steps": -1},
            "tokens.train_steps is -1, and should be an integer of at least 0",
        ),
        ({"tokens__train_steps": 1.5}, "tokens.train_steps is 1.5, and should be an integer"),
        ({"tokens": [1]}, r"x.yaml: tokens is \[1\], and should be a mapping with sequence_length"),
        ({"tokens": None}, "x.yaml: tokens is null, and should be a mapping"),
        ({"optimizer__weight_decay": "x"}, "optimizer.weight_decay is 'x', and should be a number"),
        ({"optimizer__weight_decay": float("nan")}, "weight_decay is nan, and should be a number"),
        ({"optimizer__clip_grad": "x"}, "clip_grad is 'x', and should be a number above 0 or null"),
        ({"optimizer__clip_grad": ...}, "clip_grad is missing, and should be a number above 0 or"),
        (
            {"optimizer__optimizer_factory__adam_beta1": 1},
            "adam_beta1 is 1, and should be a number of at least 0 and below 1",
        ),
        *(
            (
                {"optimizer__optimizer_factory__name": name},
                f"optimizer.optimizer_factory.name is '{name}', and should be adamW or muon$",
            )
            for name in ("lion", "adam", "sgd")
        ),
        (
            {"optimizer__learning_rate_scheduler__lr_decay_style": "exp"},
            "lr_decay_style is 'exp', and should be 'linear' or 'cosine' or '1-sqrt'",
        ),
        (
            {"parallelism__pp_engine": "zbv"},
            "pp_engine is 'zbv', and should be 'afab' or '1f1b' or",
        ),
        ({"model__init_method": {}}, "model.init_method should have path .*, std .* or use_mup"),
        (
            {"model__model_config": {"is_qwen2_config": True, "moe_config": {"experts": 1}}},
            "experts",
        ),
        ({"data_stages": []}, r"data_stages begin at steps \[\], and one must begin at 1"),
        ({"data_stages__0__data__dataset": {}}, "dataset has neither dataset_folder .* nor hf_da"),
        ({"data_stages__0__data__dataset": 3}, "dataset is 3, and should be a mapping with hf_"),
        (
            {"data_stages__0__data__dataset": {"hf_dataset_or_datasets": 3}},
            "hf_dataset_or_datasets is 3, and should be text or a list",
        ),
        ({"lighteval": {"task": 1}}, "lighteval.task is not known: did you mean tasks?"),
        ({"s3_upload": {}}, "s3_upload.upload_s3_path is missing"),
    ],
)
def test_what_is_no_configuration_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parallelism__context_parallel_size": 2},
            "context_parallel_size is 2, .*: attention over",
        ),
        (
            {"parallelism": {"dp": 6, "pp": 1, "tp": 1, "expert_parallel_size": 4}},
            "expert_parallel_size is 4, and dp is 6: .* it has to divide dp, as 3 does",
        ),
        (
            {"optimizer__zero_stage": 2},
            "zero_stage is 2, which cannot be served: there is 0 .* 1 .* and 3",
        ),
        *(
            (
                {"model__dtype": name},
                f"dtype is '{name}', which .*: parameters are bfloat16 or float32: in other types",
            )
            for name in ("float16", "fp16")
        ),
        ({"model__dtype": "bf16"}, r"x.yaml: model.dtype is 'bf16': did you mean bfloat16\?$"),
        ({"model__dtype": "FP32"}, r"x.yaml: model.dtype is 'FP32': did you mean float32\?$"),
        (
            {"model__init_method": {"std": 0.1, "scaling_method": "layer_index"}},
            "scaling_method is 'LAYER_INDEX', which cannot be served: Nanotron has no formula",
        ),
        (
            {"checkpoints__checkpoints_path": "s3://a/b"},
            "checkpoints_path is 's3://a/b', .*folders",
        ),
        ({"parallelism__pp_chunks": 2}, "pp_chunks is 2, and pp_engine is afab"),
        ({"parallelism__pp_engine": "interleaved"}, "interleaved, and pp is 1"),
        (
            {
                "parallelism": {"dp": 1, "tp": 1, "pp": 2, "pp_engine": "interleaved"},
                "tokens__batch_accumulation_per_replica": 5,
            },
            "batch_accumulation_per_replica is 5, .* rounds of pp=2 micro batches: use 4",
        ),
        (
            {"tokens__sequence_length": 256},
            "tokens.sequence_length is 256, and the model has 128 pos",
        ),
        (
            {"data_stages__0__sequence_length": 129},
            "data_stages.0.sequence_length is 129, and .* 128",
        ),
        (
            {"data_stages__0__start_training_step": 2},
            r"begin at steps \[2\], and one must begin at 1",
        ),
        (
            {
                "parallelism": {"dp": 1, "pp": 1, "tp": 4, "tp_mode": "REDUCE_SCATTER"},
                "data_stages__0__sequence_length": 33,
            },
            "data_stages.0.sequence_length is 33, .* 2 x 33 tokens, which do not scatter over tp=4",
        ),
        ({"data_stages": DOCUMENT["data_stages"] * 2}, "two stages have the name 'only'"),
        ({"model__model_config": None}, "model_config is missing: it may be left out where"),
        (
            {"data_stages__0__data__dataset": {"hf_dataset_or_datasets": "text"}},
            "data_stages.0.data.dataset is text, which needs a tokenizer: set tokenizer",
        ),
        (
            {"data_stages__0__data__dataset": {"dataset_folder": ["a"], "dataset_weights": [1, 2]}},
            "dataset_weights has 2 values, and there are 1 folders",
        ),
        (
            {"optimizer__weight_decay_exclude_named_params": ["("]},
            r"named_params.0 is '\(', and no regular expression",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)


def test_ranks_are_counted() -> None:
    config = read(parallelism={"dp": 2, "pp": 2, "tp": 2})
    check_world_size(config, 8)
    with pytest.raises(TopologyError, match=r"dp=2 x pp=2 x tp=2 are 8 ranks, and 4 were started"):
        check_world_size(config, 4)


@pytest.mark.parametrize(
    ("sizes", "started", "message"),
    [
        ((1, 1, 3), 1, "are 3 ranks, and 1 was started (WORLD_SIZE): start torchrun with 3 in all, "
            "or set --parallelism.tp=1"),
        ((4, 1, 1), 1, "start torchrun with 4 in all, or set --parallelism.dp=1"),
        ((1, 1, 1), 2, "is 1 rank, and 2 were started (WORLD_SIZE): start it without torchrun, or "
            "set --parallelism.dp=2"),
        ((1, 1, 3), 2, "and 2 were started (WORLD_SIZE): start torchrun with 3 in all"),
        ((1, 2, 1), 4, "start torchrun with 2 in all, or set --parallelism.dp=2"),
    ],
)  # fmt: skip
def test_what_to_do_about_another_number_of_ranks(
    sizes: tuple[int, int, int], started: int, message: str
) -> None:
    config = read(parallelism=dict(zip(("dp", "pp", "tp"), sizes, strict=True)))
    with pytest.raises(TopologyError, match=f"{re.escape(message)}$"):
        check_world_size(config, started)


def test_fields_without_effect_are_named_once() -> None:
    stages = [
        {"name": str(k), "start_training_step": k, "data": {"dataset": None, "seed": 1,
         "num_loading_workers": 2}}
        for k in (1, 5)
    ]  # fmt: skip
    config = read(
        data_stages=stages,
        profiler={"profiler_export_path": "tb"},
        lighteval={},
        s3_upload=None,
        general__ignore_sanity_checks=True,
    )
    assert [warning.partition(" has no effect")[0] for warning in config.warnings] == [
        "x.yaml: data_stages.0.data.num_loading_workers",
        "x.yaml: profiler",
        "x.yaml: lighteval",
    ]
    assert read().warnings == ()
    # What Nanotron writes of itself asks for nothing.
    stages[0]["data"] = {"dataset": None, "seed": 1, "num_loading_workers": 1}
    stages[1]["data"] = stages[0]["data"]
    assert read(data_stages=stages, model__ddp_bucket_cap_mb=25).warnings == ()


def test_what_makes_no_sense_together_is_told() -> None:
    config = read(
        parallelism={"dp": 1, "pp": 8, "tp": 1, "pp_engine": "1f1b"},
        tokens__val_check_interval=5,
        tokens__train_steps=4,
        model__dtype="float32",
        data_stages=[
            *DOCUMENT["data_stages"],
            {**DOCUMENT["data_stages"][0], "name": "late", "start_training_step": 5},
        ],
    )
    told = "\n".join(config.warnings)
    for words in (
        "never reached",
        "no validation every 5",
        r"micro batches \(4\) than stages \(8\)",
    ):
        assert re.search(words, told)
    assert "accumulate_grad_in_fp32 has no effect" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_warmup_steps": 20}, "lr_warmup_steps is 20, and there are 20 steps: .* never decays"),
        (
            {"lr_warmup_steps": 5, "lr_decay_starting_step": 4},
            "lr_decay_starting_step is 4, within the warmup of 5 steps",
        ),
        ({"min_decay_lr": 0.01}, "min_decay_lr is 0.01, above the learning_rate of 0.0003"),
    ],
)
def test_a_learning_rate_that_goes_another_way_is_told(
    changes: dict[str, Any], message: str
) -> None:
    rate = {"learning_rate": 3e-4, "lr_warmup_steps": 2, **changes}
    (warning,) = read(optimizer__learning_rate_scheduler=rate).warnings
    assert re.search(message, warning)


@pytest.mark.parametrize(
    ("added", "key"),
    [("tokens:\n  train_steps: 5\n", "tokens"), ("extra: {ab: 1,\n b: 2,\n ab: 3}\n", "ab")],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, added: str, key: str) -> None:
    path = tmp_path / "twice.yaml"
    text = yaml.safe_dump(DOCUMENT)
    path.write_text(text + added)
    lines = enumerate((text + added).splitlines(), 1)
    first, again = (number for number, line in lines if re.search(rf"(^| |{{){key}:", line))
    message = f"{path}: {key} is there twice, in line {first} and in line {again}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainingConfig.load(path)
    with pytest.raises(ConfigError, match="--model: std is there twice, in line 1 and in line 1"):
        TrainingConfig.load(save(path), ["--model={std: 1, std: 2}"])


def test_what_a_merge_brings_may_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    rate = "{learning_rate: 1.0e-4, lr_warmup_steps: 1}"
    changes = {"optimizer__learning_rate_scheduler": "HERE"}
    text = yaml.safe_dump(document(**changes))
    path.write_text(text.replace("HERE", f"{{<<: {rate}, lr_warmup_steps: 2}}"))
    found = TrainingConfig.load(path).optimizer.learning_rate_scheduler
    assert (found.learning_rate, found.lr_warmup_steps) == (1e-4, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML at line 1, column 5"),
        ("- 1", "not a mapping with sections"),
        ("", "not a mapping with sections"),
        ("a: !!python/object:os.x {}", "not YAML at line 1, column 4"),
        ("a: 2020-13-45", "not YAML"),
        ("? [a, b]\n: 1", "not YAML at line 1, column 3: found unhashable key"),
        ("1: 2", "1 is not known"),
        ("a: caf\xe9 ", "not YAML at byte 6, counted from 0: invalid continuation byte$"),
        (
            "a: caf\1",
            "not YAML at character 6, counted from 0: special characters are not allowed$",
        ),
    ],
)
def test_a_file_that_is_no_document(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=rf"bad.yaml: {message}"):
        TrainingConfig.load(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match=r"gone.yaml: no such file"):
        TrainingConfig.load(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--token.train_steps=3", r"^--token is not known: did you mean tokens\?"),
        ("--profiler.wait=2", "^--profiler.profiler_export_path is missing"),
        ("--tokens.train_steps=x", "^--tokens.train_steps is 'x', and should be an integer"),
        ("--tokens.steps=5", "^--tokens.steps is not known: did you mean train_steps?"),
        ("--tokens={a: 1}", "^--tokens.a is not known"),
        ("--data_stages.1.name=x", "^--data_stages.1.name: 1 should be the index of one of 1 ele"),
        ("--data_stages.a.name=x", "^--data_stages.a.name: a should be the index"),
        ("--general.project.x=1", "general.project is 'test', which has nothing below it"),
        ("--tokens.train_steps", "it has no value; write --tokens.train_steps=VALUE"),
        ("--tokens..x=1", "write --section.key=VALUE"),
        ("--tokens.train_steps=[", "^--tokens.train_steps: not YAML"),
        ("--model.model_config.hidden_size=a", "^--model.model_config.hidden_size is 'a', and"),
        ("--parallelism.context_parallel_size=2", "^--parallelism.context_parallel_size is 2, wh"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.load(path, [override])
