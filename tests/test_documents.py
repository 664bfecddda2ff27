"""The small files beside the weights: types that Nanotron's strict readers ask for, durability."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import nanotron_fast as nf
from nanotron_fast.errors import UnsupportedModelError
from nanotron_fast.formats.nanotron.classes import LLAMA_CONFIG, classes

FIELDS = {each.name: each.fields for each in classes()}


def check_types(config: dict[str, Any], model_class: str) -> None:
    for name, default in FIELDS[model_class].items():
        if name not in config or config[name] is None or default is None:
            continue
        assert type(config[name]) is type(default), (name, config[name])


@pytest.mark.parametrize(
    ("case", "model_class"),
    [
        ("llama_untied", "LlamaConfig"),
        ("qwen2", "Qwen2Config"),
        ("qwen2_moe", "Qwen2Config"),
        ("starcoder2", "Starcoder2Config"),
    ],
)
def test_every_field_of_the_class_is_there_with_its_type(
    case: str, model_class: str, tmp_path: Path, golden: Path
) -> None:
    nf.convert(golden / case / "hf", tmp_path / "out", topology=nf.Topology(tp=2))
    config = json.loads((tmp_path / "out" / "model_config.json").read_text())
    assert list(config) == list(FIELDS[model_class])
    check_types(config, model_class)
    if model_class != "Starcoder2Config":
        document = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
        assert document["model"]["model_config"] == config
        check_types(document["model"]["model_config"], model_class)


def test_config_yaml_says_where_and_how(tmp_path: Path, golden_hf: Path) -> None:
    out = tmp_path / "out"
    nf.convert(golden_hf, out, topology=nf.Topology(tp=2, pp=2), dtype="fp32")
    document = yaml.safe_load((out / "config.yaml").read_text())
    assert document["model"]["init_method"] == {"path": str(out)}
    assert document["model"]["dtype"] == "float32"
    assert document["model"]["make_vocab_size_divisible_by"] == 1
    assert document["parallelism"]["tp"] == document["parallelism"]["pp"] == 2
    assert document["tokens"]["sequence_length"] == 128
    assert document["data_stages"][0]["data"]["dataset"] is None
    # Nanotron refuses to accumulate in fp32 what is fp32 already.
    assert document["optimizer"]["accumulate_grad_in_fp32"] is False
    assert isinstance(document["optimizer"]["optimizer_factory"]["adam_eps"], float)
    assert isinstance(document["optimizer"]["learning_rate_scheduler"]["min_decay_lr"], float)


def test_version_1_2_has_the_older_fields(tmp_path: Path, golden_hf: Path) -> None:
    nf.convert(golden_hf, tmp_path / "out", checkpoint_version="1.2")
    config = json.loads((tmp_path / "out" / "model_config.json").read_text())
    assert list(config) == list(LLAMA_CONFIG.fields_1_2)
    assert not {"rope_theta", "rope_interleaved", "attention_bias"} & set(config)
    document = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert "data" in document
    assert "adam_eps" in document["optimizer"]
    assert "data_stages" not in document


@pytest.mark.parametrize(
    ("case", "pp", "words"),
    [
        ("llama_untied", 2, "pp=2"),
        ("qwen2", 2, "Qwen2 model crashes"),
        ("starcoder2", 1, "no config.yaml is written"),
        ("qwen2", 1, None),
        ("llama_untied", 1, None),
    ],
)
def test_what_nanotron_cannot_do_with_it_is_said(
    case: str, pp: int, words: str | None, tmp_path: Path, golden: Path
) -> None:
    plan = nf.plan(golden / case / "hf", tmp_path / "out", topology=nf.Topology(pp=pp))
    if words is None:
        assert plan.warnings == ()
    else:
        assert any(words in warning for warning in plan.warnings)


def test_fsync_syncs_every_file_folder_and_the_rename(
    tmp_path: Path, golden_hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    out = tmp_path / "out"
    nf.convert(golden_hf, out, fsync=True)
    partial = f"{out}.partial/content"
    synced = {re.sub(r"\.partial-\w+", ".partial", name) for name in synced}
    # The engine syncs the tensors' files itself; what Python writes and every folder is seen here.
    for path in out.iterdir():
        if path.is_file():
            assert f"{partial}/{path.name}" in synced
    for folder, _, _ in os.walk(out):
        assert folder.replace(str(out), partial, 1) in synced
    assert str(tmp_path) in synced
    synced.clear()
    nf.convert(golden_hf, tmp_path / "other")
    assert synced == set()


def test_fsync_syncs_the_folders_that_it_made(
    tmp_path: Path, golden_hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    nf.convert(golden_hf, tmp_path / "new" / "deeper" / "out", fsync=True)
    assert {str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new" / "deeper")} <= synced


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_rotary_embeddings", False),
        ("use_position_embeddings", True),
        ("scale_attn_weights", False),
        ("global_attn_layers", [0]),
    ],
)
def test_a_starcoder2_that_hugging_face_computes_otherwise_is_refused(
    name: str, value: object, tmp_path: Path, golden: Path
) -> None:
    there = tmp_path / "there"
    nf.convert(golden / "starcoder2" / "hf", there)
    path = there / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UnsupportedModelError, match=name):
        nf.convert(there, tmp_path / "back")
    assert not (tmp_path / "back").exists()
