"""A configuration's model is what `nanotron_fast.models` builds of the same folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nanotron_fast as nf
from nanotron_fast.errors import ConfigError, TopologyError, UnsupportedModelError
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG
from nanotron_fast.model.spec import COMPUTED
from nanotron_fast.models import Decoder, build, load
from nanotron_fast.models.architecture import Architecture
from nanotron_fast.train import TrainingConfig
from nanotron_fast.train.architecture import ModelPlan, architecture
from tests.modelzoo import make
from tests.train.configs import MODEL_CONFIG, document

LINEAR = {"rope_type": "linear", "factor": 2.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with a scaling": ("llama", {"rope_scaling": LINEAR}),
    "llama of our class": ("llama", {"attention_bias": True, "rope_scaling": LINEAR}),
    "mistral with a window": ("mistral", {"sliding_window": 9}),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {"vocab_size": 99, "sliding_window": 9}),
    "qwen2_moe": ("qwen2_moe", {"vocab_size": 99}),
}


def plan_of(path: Path, **changes: Any) -> ModelPlan:
    model = {"init_method": {"path": str(path)}, "make_vocab_size_divisible_by": 8}
    return architecture(
        TrainingConfig.from_dict(document(model=model, tokens__sequence_length=16, **changes))
    )


def given(**changes: Any) -> ModelPlan:
    config = document(model__model_config={**MODEL_CONFIG, **changes})
    return architecture(TrainingConfig.from_dict(config, name="x.yaml"))


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_and_a_load_agree(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    hf = make(family, **changes).save(tmp_path / "hf")
    interleaved = family not in ("mistral", "starcoder2") and "our class" not in name
    nf.convert(
        hf,
        tmp_path / "nanotron",
        topology=nf.Topology(tp=2),
        target="nanotron-fast",
        rope_interleaved=interleaved,
        pad_vocab_to_multiple_of=64,
    )
    for path in (hf, tmp_path / "nanotron"):
        plan = plan_of(path, parallelism={"dp": 1, "pp": 1, "tp": 2})
        found = plan.architecture
        assert found == Architecture.of_checkpoint(path, pad_vocab_to_multiple_of=16)
        assert list(plan.params) == found.params()
        assert found.rope_interleaved == (interleaved and path != hf)
        assert found.vocab_size == make(family, **changes).config["vocab_size"]
        assert found.spec.vocab_size == -(-found.vocab_size // 16) * 16
        assert found.spec.rope_scaling == changes.get("rope_scaling")
        assert (found.model_class is NANOTRON_FAST_CONFIG) == ("our class" in name)
        # What its checkpoints say is the same model again.
        again = Architecture.of_model_config(plan.model_config)
        for name_of in COMPUTED:
            assert getattr(again.spec, name_of) == getattr(found.spec, name_of), name_of
        assert (again.family, again.model_class) == (found.family, found.model_class)
        assert again.rope_interleaved == found.rope_interleaved


@pytest.mark.parametrize("is_converted", [False, True])
def test_a_plan_is_loaded_with_its_padding_and_rotary_rows(
    is_converted: bool, tmp_path: Path
) -> None:
    path = make("llama", vocab_size=99, dtype="F32").save(tmp_path / "hf")
    ids = torch.arange(12).view(1, -1)
    expected = build(path)(ids)
    if is_converted:
        path = tmp_path / "nanotron"
        nf.convert(tmp_path / "hf", path, pad_vocab_to_multiple_of=64, rope_interleaved=True)
    architecture = replace(plan_of(path).architecture, rope_interleaved=not is_converted)
    decoder = Decoder(architecture, device="cpu")
    load(decoder, path)
    assert decoder.setting.interleaved is not is_converted
    logits = decoder(ids)
    assert logits.shape[-1] == 104
    torch.testing.assert_close(logits[..., :99], expected)
    assert not logits[..., 99:].any()


def test_a_scaling_that_nanotron_ignored_is_left_out_and_said(tmp_path: Path) -> None:
    hf = make("llama", rope_scaling=LINEAR).save(tmp_path / "hf")
    stored = tmp_path / "nanotron"
    nf.convert(hf, stored, target="nanotron-fast")
    assert plan_of(stored).warnings == ()
    (stored / "nanotron_fast.json").unlink()
    plan = plan_of(stored)
    (warning,) = plan.warnings
    assert f"{stored}: its rope_scaling is left out" in warning
    assert plan.architecture.spec.rope_scaling is None
    assert plan.model_config["rope_scaling"] is None


def test_layers_that_nanotron_gives_no_window_have_none(tmp_path: Path) -> None:
    stored = tmp_path / "nanotron"
    nf.convert(make("smollm3").save(tmp_path / "hf"), stored)
    path = stored / "model_config.json"
    config = {**json.loads(path.read_text()), "sliding_window_size": 5}
    path.write_text(json.dumps(config))
    plan = plan_of(stored)
    assert set(plan.architecture.spec.windows) == {5, None}
    # And the next checkpoint has the field still.
    assert plan.model_config["sliding_window_size"] == 5
    assert Architecture.of_model_config(plan.model_config).spec == plan.architecture.spec


def test_nanotrons_llama_has_no_biases() -> None:
    plan = given(attention_bias=True)
    assert not plan.architecture.spec.has_qkv_bias
    assert plan.warnings == (
        "x.yaml: model.model_config.attention_bias has no effect: whatever it says, Nanotron's "
        "LlamaConfig has no biases",
    )
    assert given().warnings == ()


def test_a_starcoder2_of_a_yaml_is_grouped() -> None:
    sizes = {"is_starcoder2_config": True, "hidden_size": 64, "num_attention_heads": 8}
    with pytest.raises(
        UnsupportedModelError, match=r"^config: model\.model_config\.grouped_query is false: such"
    ):
        TrainingConfig.from_dict(document(model__model_config=sizes))
    sizes |= {"grouped_query": True, "num_kv_heads": 2, "vocab_size": 100}
    plan = architecture(TrainingConfig.from_dict(document(model__model_config=sizes)))
    assert plan.architecture.spec.num_kv_heads == 2
    assert not plan.architecture.spec.has_gated_mlp


def test_dropout_is_said_to_have_no_effect(tmp_path: Path) -> None:
    rates = {"residual_dropout": 0.1, "embedding_dropout": 0.25}
    plan = plan_of(make("starcoder2", **rates).save(tmp_path / "hf"))
    assert plan.warnings == (
        "config: model.init_method.path: embedding_dropout 0.25, residual_dropout 0.1 without "
        "effect: nothing is dropped",
    )
    config = document(model__model_config=plan.model_config, tokens__sequence_length=16)
    again = architecture(TrainingConfig.from_dict(config))
    assert again.architecture.spec.layers == plan.architecture.spec.layers
    (warning,) = again.warnings
    assert warning.startswith("config: model.model_config: embedding_dropout 0.25,")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        *(
            (
                {"pp": pp},
                f"x.yaml: parallelism.pp is {pp}, which is too many .* some stage would own "
                "nothing of its 4 layers, norm and head; set --parallelism.pp=6$",
            )
            for pp in (7, 8, 9)
        ),
        (
            {"pp": 2, "pp_engine": "interleaved", "pp_chunks": 4},
            r"pp is 2 x pp_chunks=4, which is too .* 4 layers.*set --parallelism.pp_chunks=[23]$",
        ),
        (
            {"tp": 3},
            r"^x.yaml: parallelism.tp is 3: model\.decoder\.0\..*: 8 heads do not split over tp=3$",
        ),
    ],
)
def test_ranks_that_the_model_does_not_spread_over(layout: dict[str, Any], message: str) -> None:
    config = document(parallelism={"dp": 1, "pp": 1, "tp": 1, **layout})
    with pytest.raises(TopologyError, match=message):
        architecture(TrainingConfig.from_dict(config, name="x.yaml"))


def test_a_path_of_weights_that_is_empty() -> None:
    config = TrainingConfig.from_dict(document(model={"init_method": {"path": ""}}), name="x.yaml")
    with pytest.raises(ConfigError, match=r"^x\.yaml: model\.init_method\.path: an empty string"):
        architecture(config)
