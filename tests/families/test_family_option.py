"""`--family` changes the table of tensors, never what the source's config says it computes."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast import families
from nanotron_fast.errors import NanotronFastError, UnsupportedModelError
from nanotron_fast.families import family_named, family_names
from nanotron_fast.families.foreign import _keys_read, seen_as
from nanotron_fast.families.model_types import LIKE_LLAMA, NEUTRAL, REFUSED
from tests.modelzoo import make, read_tensors
from tests.refusals import refused

NEUTRAL_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1,
    "attention_multiplier": 8**-0.5,
}
# The source's model_type, what its config has beside a llama's keys, the family given by hand.
COMPUTES_OTHERWISE: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "granite": (
        "granite",
        {**NEUTRAL_GRANITE, "logits_scaling": 8.0},
        "llama",
        "'granite', and its factor of logits: 0.125, where a llama has 1.0",
    ),
    "granite-by-default": (
        "granite",
        {key: NEUTRAL_GRANITE[key] for key in NEUTRAL_GRANITE if key != "attention_multiplier"},
        "llama",
        "its scale of layer 0: 1.0, where a llama has None",
    ),
    "ernie": ("ernie4_5", {}, "llama", "'ernie4_5', and its rotary embedding turns neighbours"),
    "helium": ("helium", {}, "llama", "turns neighbours"),
    "glm": ("glm", {}, "llama", "turns neighbours"),
    "cohere": ("cohere", {"rope_theta": 1e4}, "llama", "turns neighbours in a head, where"),
    "gemma": ("gemma", {}, "llama", "its addition of 1 to norms' weights: True"),
    "ministral3": ("ministral3", {}, "mistral", "scales queries"),
    "minicpm": ("minicpm", {}, "llama", "scale_emb"),
    "window-to-llama": ("mistral", {"sliding_window": 8}, "llama", "its sliding_window: 8, where"),
    "window-by-default": ("mistral", {"sliding_window": ...}, "llama", "sliding_window: 4096"),
    "window-of-qwen": (
        "qwen2",
        {"sliding_window": 8},
        "mistral",
        "its sliding_window: None, where a mistral has 8",
    ),
    "nope": (
        "smollm3",
        {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
        "llama",
        "its no_rope_layers: 2",
    ),
    "ministral": ("ministral", {"sliding_window": 8}, "llama", "its sliding_window is 8"),
    "ministral-by-default": ("ministral", {}, "llama", "its sliding_window is 4096"),
    "starcoder2": ("starcoder2", {}, "llama", "its biases on q, k and v: True, where a llama"),
    "softcapping": ("unheard_of", {"final_logit_softcapping": 30.0}, "llama", "softcapping is 30"),
    "qk-norm": ("unheard_of", {"use_qk_norm": True}, "llama", "use_qk_norm is True"),
    "neighbours": ("unheard_of", {"rope_interleaved": True}, "llama", "rope_interleaved is True"),
    "nope-unheard-of": ("unheard_of", {"no_rope_layers": [1, 0]}, "llama", "no_rope_layers is"),
    "eps-unheard-of": ("unheard_of", {"norm_eps": 1e-3}, "llama", "norm_eps is 0.001"),
    "kinds-unheard-of": (
        "unheard_of",
        {"sliding_window": 8, "layer_types": ["full_attention", "full_attention"]},
        "llama",
        "sliding_window is 8",
    ),
}


def save(root: Path, model_type: Any, changes: dict[str, Any], table: str = "llama") -> Path:
    """A llama's tensors under a config of another type."""
    model = make(table, num_hidden_layers=2)
    model.config.update(changes)
    config = {key: value for key, value in model.config.items() if value is not ...}
    model.config = {**config, "model_type": None if model_type is ... else model_type}
    model.save(root)
    if model_type is ...:
        config = json.loads((root / "config.json").read_text())
        del config["model_type"]
        (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("name", COMPUTES_OTHERWISE)
def test_what_computes_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    model_type, changes, family, message = COMPUTES_OTHERWISE[name]
    if model_type == "qwen2":
        changes = {**changes, "use_sliding_window": False}
    source = save(tmp_path / "hf", model_type, changes)
    full = f"--family {family}: config.json's model_type is .*{message}"
    refused(source, tmp_path, UnsupportedModelError, full, family=family)
    found = nf.inspect(source, family=family)
    assert found.problem is not None
    assert found.problem.startswith(f"--family {family}")


@pytest.mark.parametrize(
    ("model_type", "changes", "table", "family"),
    [
        ("granite", NEUTRAL_GRANITE, "llama", "llama"),
        ("mistral", {"sliding_window": None}, "llama", "llama"),
        ("smollm3", {"no_rope_layers": [1, 1]}, "llama", "llama"),
        ("ministral", {"sliding_window": None}, "llama", "mistral"),
        ("ministral", {"sliding_window": 8}, "llama", "mistral"),
        ("seed_oss", {"head_dim": 8}, "qwen2", "qwen2"),
        ("internlm3", {"head_dim": None}, "llama", "llama"),
        ("iquestcoder", {"head_dim": None}, "llama", "llama"),
    ],
)
def test_what_computes_the_same_goes_there_and_back(
    model_type: str, changes: dict[str, Any], table: str, family: str, tmp_path: Path
) -> None:
    source = save(tmp_path / "hf", model_type, changes, table)
    report = nf.convert(source, tmp_path / "there", family=family)
    assert report.plan.warnings == ()
    nf.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == model_type
    assert (
        config["rms_norm_eps"] == json.loads((source / "config.json").read_text())["rms_norm_eps"]
    )


def test_relatives_turn_the_same_rows() -> None:
    llama = family_named("llama")
    other = dataclasses.replace(llama, name="other", rotates_neighbours=True)
    config = {**make("llama").config, "model_type": "llama"}
    with pytest.raises(
        UnsupportedModelError, match="turns halves of a head, where that of a other"
    ):
        seen_as(other, config, {"llama": llama, "other": other})


def test_absent_keys_have_the_defaults_of_the_own_class(tmp_path: Path) -> None:
    changes = {"rope_theta": ..., "no_rope_layers": [1, 1], "tie_word_embeddings": False}
    source = save(tmp_path / "hf", "smollm3", changes)
    assert nf.plan(source, tmp_path / "out", family="llama").spec.rope_theta == 2e6


def test_a_type_that_nobody_knows_passes_with_a_warning(tmp_path: Path) -> None:
    changes = {"layer_types": ["full_attention"] * 2, "sliding_window": 8}
    changes |= {"use_sliding_window": False, "use_qk_norm": False, "hidden_activation": "silu"}
    source = save(tmp_path / "hf", "unheard_of", changes)
    plan = nf.plan(source, tmp_path / "out", family="llama")
    assert plan.warnings[0].startswith("config.json: nothing is known of model_type 'unheard_of'")
    nf.convert(source, tmp_path / "there", family="llama")
    found = nf.verify(source, tmp_path / "there", family="llama")
    assert found.equal
    assert "'unheard_of'" in found.warnings[0]


@pytest.mark.parametrize("value", [10**400, float("nan"), "1", [1], {}, -(2**70)])
@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_senseless_values_of_keys_that_are_looked_at(key: str, value: Any) -> None:
    model = make("llama", num_hidden_layers=1)
    config = {**model.config, "model_type": "unheard_of", key: value}
    with suppress(NanotronFastError):
        families.family_of_config(config, "llama")


@pytest.mark.parametrize("model_type", [None, ...], ids=["null", "absent"])
def test_no_model_type_is_one_that_nobody_knows(model_type: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "hf", model_type, {})
    config = json.loads((source / "config.json").read_text())
    for key, value in {
        "sliding_window": 16,
        "attention_multiplier": 3,
        "use_qk_norm": True,
    }.items():
        wrong = {**config, key: value}
        (source / "config.json").write_text(
            json.dumps({each: wrong[each] for each in wrong if wrong[each] is not ...})
        )
        message = f"--family llama: config.json has no model_type, and its {key} is {value}"
        refused(source, tmp_path, UnsupportedModelError, message, family="llama")
    (source / "config.json").write_text(json.dumps(config))
    plan = nf.plan(source, tmp_path / "out", family="llama")
    assert plan.warnings[0].startswith("config.json: it has no model_type; it is converted as if")
    nf.convert(source, tmp_path / "there", family="llama")
    nf.convert(tmp_path / "there", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == "llama"


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("Ernie4_5", {}, "turns neighbours"),
        ("GRANITE", {}, "its scale of layer 0: 1.0, where a llama has None"),
        ("Mistral", {"sliding_window": 8}, "its sliding_window: 8, where"),
        ("cohere_compass_text", {}, "LayerNorm"),
        ("granitemoe_swa", {}, "learned sinks"),
        ("dots1", {}, "qk-norm"),
        ("aria_text", {}, "renormalises"),
    ],
)
def test_types_by_any_spelling(
    model_type: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = save(tmp_path / "hf", model_type, changes)
    refused(source, tmp_path, UnsupportedModelError, message, family="llama")


def test_refused_types_say_why_in_a_line(tmp_path: Path) -> None:
    for reason in REFUSED.values():
        assert reason
        assert "\n" not in reason
    used = (
        "gemma2 gemma3_text mixtral phi3 gpt2 gpt_neox opt bloom falcon glm4 "
        "deepseek_v2 llama4 olmo2 cohere t5 bert roberta clip whisper mamba qwen2_vl"
    )
    # A type that has a table by now is refused no more.
    for model_type in {*used.split()} - {*family_names()}:
        source = save(tmp_path / model_type, model_type, {})
        message = f"model_type '{model_type}' is not supported: {REFUSED[model_type][:20]}"
        with pytest.raises(UnsupportedModelError, match=message.replace("(", ".")):
            nf.plan(source, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match=r"'internlm3' .* --family llama"):
        nf.plan(save(tmp_path / "internlm3", "internlm3", {}), tmp_path / "out")


# Fields of the classes that change nothing about what a model computes with its weights.
HARMLESS = {
    "vocab_size",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "attention_dropout",
    "residual_dropout",
    "pretraining_tp",
    "rope_parameters",
}


@pytest.mark.parametrize("model_type", LIKE_LLAMA)
def test_the_table_is_that_of_transformers(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    kind = transformers.CONFIG_MAPPING[model_type]
    if not dataclasses.is_dataclass(kind):
        pytest.skip("this version of transformers has no fields to ask for")
    base = {field.name for field in dataclasses.fields(transformers.PretrainedConfig)}
    own = {field.name: field.default for field in dataclasses.fields(kind)}
    known = HARMLESS | NEUTRAL.keys() | _keys_read(family_named("llama"))
    assert own.keys() - base - known == set()
    for key, value in LIKE_LLAMA[model_type].items():
        if key == "rope_theta":
            assert getattr(kind, "default_theta", 10000.0) == value
        elif key in own:
            assert own[key] == value, key
        else:
            assert value in (None, False), key


@pytest.mark.parametrize("model_type", ["granite", "internlm3", "iquestcoder", "ministral"])
def test_the_same_logits_as_a_llama(model_type: str, tmp_path: Path) -> None:
    """What is said to compute as a Llama does, in transformers' own code."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    changes: dict[str, Any] = {"head_dim": 8, "sliding_window": 100}
    changes |= NEUTRAL_GRANITE if model_type == "granite" else {}
    roots = [save(tmp_path / each, each, changes) for each in ("llama", model_type)]
    ids = torch.arange(24)[None]
    outputs = []
    for root in roots:
        model = transformers.AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
        with torch.no_grad():
            outputs.append(model.eval()(ids).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)
