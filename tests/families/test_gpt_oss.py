"""gpt-oss as it is published: experts in blocks of 32 four-bit numbers with a scale each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.families import zoo
from tests.refusals import refused

SIZES = {"hidden_size": 64, "intermediate_size": 32}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The published form, and what transformers makes of it."""
    entry = zoo.ZOO["gpt_oss"]
    changed = zoo.Entry(entry.kind, {**entry.changes, **SIZES}, entry.tolerance)
    monkeypatch.setitem(zoo.ZOO, "gpt_oss", changed)
    plain = zoo.save("gpt_oss", tmp_path / "plain", torch.bfloat16)
    tensors = load_file(plain / "model.safetensors")
    published = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            published[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        blocks = torch.randint(
            256, (experts, columns, rows // 32, 16), dtype=torch.uint8, generator=generator
        )
        scales = torch.randint(120, 126, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
        published[f"{name}_blocks"], published[f"{name}_scales"] = blocks, scales
        tensors[name] = convert_moe_packed_tensors(
            blocks, scales, dtype=torch.bfloat16
        ).contiguous()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    save_file(published, quantised / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, plain


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2, pp=2), Topology(ep=2)], ids=str)
def test_blocks_become_what_transformers_makes_of_them(
    topology: Topology, models: tuple[Path, Path], tmp_path: Path
) -> None:
    quantised, plain = models
    report = nf.convert(quantised, tmp_path / "there", topology=topology)
    assert any("dequantised from mxfp4" in warning for warning in report.plan.warnings)
    nf.convert(plain, tmp_path / "expected", topology=topology)
    assert nf.verify(tmp_path / "there", tmp_path / "expected").equal
    assert nf.verify(quantised, tmp_path / "there").equal
    assert nf.verify(plain, tmp_path / "there", logits=topology.ep == 1).equal


def test_inspect_says_so(models: tuple[Path, Path]) -> None:
    found = nf.inspect(models[0])
    assert (found.family, found.problem) == ("gpt_oss", None)
    assert found.quantization == "mxfp4 (blocks of 32)"
    assert nf.inspect(models[1]).quantization is None


_STACK = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("scales", None, CheckpointError, "up_proj_blocks is there, and .*_scales is missing"),
        ("blocks", None, CheckpointError, "up_proj_scales is there, and .*_blocks is missing"),
        ("scales", lambda scales: scales[:, :-1], CheckpointError, "_scales .* takes"),
        ("scales", lambda scales: scales[..., None], CheckpointError, "_scales .* takes"),
        ("scales", lambda scales: scales[:0], CheckpointError, "_scales .* takes"),
        ("blocks", lambda blocks: blocks[..., :8], CheckpointError, "_blocks has shape .* takes"),
        ("scales", lambda scales: scales.float(), UnsupportedModelError, "_scales is F32, and U8"),
    ],
)
def test_blocks_and_scales_that_do_not_go_together_are_refused(
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    error: Any,
    message: str,
    models: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    path = models[0] / "model.safetensors"
    tensors = load_file(path)
    found = tensors.pop(f"{_STACK}_{name}")
    if change is not None:
        tensors[f"{_STACK}_{name}"] = change(found).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    refused(models[0], tmp_path, error, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": ...}, "neither rope_parameters nor rope_scaling: transformers takes"),
        ({"rope_parameters": None}, "rope_parameters is null, which transformers 4 takes for no"),
        (
            {"rope_parameters": ..., "rope_scaling": None},
            "rope_scaling is null, which transformers 4 takes for no scaling and version 5 for its",
        ),
    ],
)
def test_scaling_that_versions_read_otherwise_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = zoo.save("gpt_oss", tmp_path / "hf", torch.bfloat16)
    path = source / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    refused(source, tmp_path, ConfigError, message)
