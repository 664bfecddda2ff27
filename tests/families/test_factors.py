"""Families that multiply and cap what they compute, and what their config.json may leave out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.errors import CheckpointError, ConfigError, UnsupportedModelError
from nanotron_fast.families import family_named
from nanotron_fast.families.hf_config import read_config, write_config
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.moves.dtypes import Dtype
from tests.families import zoo

NAMES = ["cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite"]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def read(name: str, **changes: Any) -> ModelSpec:
    """A config of the family's smallest keys; ... takes one out."""
    config = {**SIZES, "model_type": name, **changes}
    said = {key: value for key, value in config.items() if value is not ...}
    return read_config(family_named(name), said)


def written(name: str, spec: ModelSpec) -> dict[str, Any]:
    return write_config(family_named(name), spec, Dtype.F32)


@pytest.mark.parametrize("name", NAMES)
def test_absent_keys_have_the_defaults_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = transformers.CONFIG_MAPPING[name]
    if not dataclasses.is_dataclass(kind):
        pytest.skip("this version of transformers has no fields to ask for")
    theirs = {field.name: field.default for field in dataclasses.fields(kind)}
    ours = dict(family_named(name).defaults)
    bases = {"rope_theta": "global", "rope_local_base_freq": "local"}
    for key, kind_of_layer in bases.items():
        base = kind.default_theta
        base = base[kind_of_layer] if isinstance(base, dict) else base
        assert ours.pop(key, None) in (base, None)
    # A pattern is what makes layer_types where there are none.
    pattern = ours.pop("sliding_window_pattern", None)
    if pattern is not None:
        kinds = kind(num_hidden_layers=9).layer_types
        assert kinds == [SLIDING if layer % pattern else FULL for layer in range(1, 10)]
    assert ours == {key: theirs[key] for key in ours}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gemma2", "query_pre_attn_scalar", 144),
        ("gemma2", "query_pre_attn_scalar", 256),
        ("granite", "logits_scaling", 49),
        ("granite", "logits_scaling", 0.7),
        ("granite", "attention_multiplier", 0.0078125),
        ("granite", "attention_multiplier", 16**-0.5),
        ("granite", "residual_multiplier", 0.22),
        ("cohere", "logit_scale", 0.8333333333333334),
    ],
)
def test_a_number_comes_back_as_it_was(name: str, key: str, value: float) -> None:
    spec = read(name, **{key: value})
    found = written(name, spec)[key]
    assert found == value
    assert type(found) is type(value)
    assert read_config(family_named(name), written(name, spec)) == spec


def test_what_the_numbers_mean() -> None:
    gemma = read("gemma2", query_pre_attn_scalar=144, attn_logit_softcapping=None)
    assert gemma.attention.scale == 1 / 12
    assert (gemma.attention.softcap, gemma.logit_softcap) == (None, 30.0)
    assert gemma.embedding_scale == 8.0
    assert read("gemma2").attention.scale is None
    granite = read("granite", embedding_multiplier=12, logits_scaling=8.0)
    assert (granite.embedding_scale, granite.logit_scale) == (12, 0.125)
    assert granite.attention.scale == 1.0
    assert read("granite", attention_multiplier=0.25).attention.scale is None


def test_layers_with_windows_where_nothing_is_said_of_them() -> None:
    assert read("gemma2").windows == (4096, None, 4096, None, 4096)
    by_pattern = read("cohere2", sliding_window_pattern=2, sliding_window=16)
    assert by_pattern.windows == (16, None, 16, None, 16)
    assert by_pattern.no_rope_layers == (1, 3)
    assert written("cohere2", by_pattern)["layer_types"] == [SLIDING, FULL, SLIDING, FULL, SLIDING]


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "cohere2"])
def test_no_layer_with_a_window_is_said_as_transformers_takes_it(name: str) -> None:
    spec = read(name, layer_types=[FULL] * 5)
    assert not any(spec.windows)
    config = written(name, spec)
    assert config["layer_types"] == [FULL] * 5
    assert config["sliding_window"] == 4096
    assert read_config(family_named(name), config) == spec


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("granite", {"logits_scaling": 0}, ConfigError, "logits_scaling is 0, .* a positive"),
        ("granite", {"attention_multiplier": "1"}, ConfigError, "multiplier is '1', .* a number"),
        ("gemma2", {"attn_logit_softcapping": -1}, ConfigError, "softcapping is -1, .* a positive"),
        ("gemma2", {"query_pre_attn_scalar": None}, ConfigError, "scalar is None, .* a number"),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            UnsupportedModelError,
            "use_bidirectional_attention is True, and no model",
        ),
        ("cohere", {"rope_theta": ...}, ConfigError, "rope_theta is None, .* a positive number"),
        ("gemma", {"hidden_act": "gelu"}, ConfigError, "'gelu', which transformers 4 computes"),
        ("gemma", {"hidden_activation": "silu"}, ConfigError, "'silu' in hidden_activation"),
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            UnsupportedModelError,
            "attn_logit_softcapping is 50.0, and no model",
        ),
        ("cohere2", {"sliding_window_pattern": 0}, ConfigError, "pattern is 0, .* at least 1"),
        (
            "cohere2",
            {"layer_types": [FULL] * 5, "sliding_window_pattern": 4},
            ConfigError,
            "sliding_window_pattern 4 gives 4 of 5 layers a sliding window",
        ),
    ],
)
def test_what_makes_no_sense_or_is_not_computed(
    name: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(name, **changes)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "granite", "cohere2"])
def test_logits_are_compared_in_both_directions(name: str, tmp_path: Path) -> None:
    source = zoo.save(name, tmp_path / "hf")
    nf.convert(source, tmp_path / "there", topology=nf.Topology(tp=2))
    nf.convert(tmp_path / "there", tmp_path / "back")
    assert nf.verify(source, tmp_path / "there", logits=True).equal
    assert nf.verify(tmp_path / "there", tmp_path / "back", logits=True).equal


def test_the_way_back_refuses_what_the_class_cannot_say(tmp_path: Path) -> None:
    """Embeddings are multiplied by the root of the hidden size, and no key says otherwise."""
    source = zoo.save("gemma2", tmp_path / "hf")
    nf.convert(source, tmp_path / "there")
    path = tmp_path / "there" / "model_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "embedding_scale": 2.0}))
    with pytest.raises(CheckpointError, match=r"embedding_scale is 2\.0 in model_config.json"):
        nf.convert(tmp_path / "there", tmp_path / "back")
