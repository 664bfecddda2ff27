"""What --target nanotron-fast writes into model_config.json for the models that stock lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.nanotron.classes import EXTENSION_FIELDS, LLAMA_CONFIG
from tests.modelzoo import make, read_tensors

LINEAR = {"rope_type": "linear", "factor": 2.0}
# Changes to a llama's config, and what the extension's fields say then.
MODELS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "head-dim": ({"head_dim": 12}, [12, False, False]),
    "wide": ({"head_dim": 16, "num_key_value_heads": 2}, [16, False, False]),
    "biases": ({"attention_bias": True}, [8, True, False]),
    "both": ({"attention_bias": True, "head_dim": 12}, [12, True, False]),
}


def converted(tmp_path: Path, changes: dict[str, Any], **choices: Any) -> tuple[Any, Path, Any]:
    """A model, what it was converted to, without the side file, and its model_config.json."""
    model = make("llama", num_hidden_layers=2, **changes)
    source = model.save(tmp_path / "hf")
    report = nf.convert(source, tmp_path / "there", target="nanotron-fast", **choices)
    (tmp_path / "there" / "nanotron_fast.json").unlink()
    config = json.loads((tmp_path / "there" / "model_config.json").read_text())
    return model, tmp_path / "there", (config, report.plan.warnings)


@pytest.mark.parametrize("version", ["1.5", "1.2"])
@pytest.mark.parametrize("name", MODELS)
def test_every_field_that_a_reader_needs(name: str, version: str, tmp_path: Path) -> None:
    changes, expected = MODELS[name]
    model, there, (config, warnings) = converted(
        tmp_path, changes, topology=Topology(tp=2), checkpoint_version=version
    )
    assert [config[key] for key in EXTENSION_FIELDS] == expected
    document = yaml.safe_load((there / "config.yaml").read_text())
    assert document["model"]["model_config"] == config
    assert any("Nothing trains such a model yet" in warning for warning in warnings)
    # The fields are enough: neither side file nor option.
    report = nf.convert(there, tmp_path / "back")
    assert read_tensors(tmp_path / "back") == model.tensors
    assert report.plan.spec.head_dim == expected[0]
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["attention_bias"] is expected[1]


def test_a_llama_with_rope_scaling_alone_stays_a_plain_llama(tmp_path: Path) -> None:
    _, _, (config, warnings) = converted(tmp_path, {"rope_scaling": LINEAR})
    assert list(config) == list(LLAMA_CONFIG.fields)
    assert any("nanotron-fast run --rope-scaling" in warning for warning in warnings)


def test_a_plain_llama_has_no_such_field(tmp_path: Path) -> None:
    _, _, (config, warnings) = converted(tmp_path, {})
    assert list(config) == list(LLAMA_CONFIG.fields)
    assert warnings == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 16}, r"calls for \[256, 64\]"),
        (
            {"attention_output_bias": True},
            "attention_output_bias is True, and attn.o_proj.bias is missing",
        ),
    ],
)
def test_fields_that_the_tensors_contradict(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, there, (config, _) = converted(tmp_path, {"head_dim": 12})
    (there / "model_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=message):
        nf.convert(there, tmp_path / "back")
