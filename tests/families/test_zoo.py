"""Every family of the zoo goes to Nanotron and back, bit for bit, at every topology."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nanotron_fast as nf
from nanotron_fast import Topology
from tests.families.zoo import cases, save
from tests.modelzoo import read_tensors

TOPOLOGIES = [
    Topology(tp=1, pp=1),
    Topology(tp=2, pp=2),
    Topology(tp=4, pp=1),
    Topology(tp=1, pp=2),
]


def as_dict(root: Path) -> dict[str, Any]:
    """The configuration as transformers understands it."""
    from transformers import AutoConfig

    found: dict[str, Any] = AutoConfig.from_pretrained(root).to_dict()
    return {
        key: value
        for key, value in found.items()
        if key not in ("transformers_version", "_name_or_path")
    }


@pytest.mark.parametrize("name", cases())
def test_there_and_back(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "hf", torch.bfloat16)
    tensors, config = read_tensors(source), as_dict(source)
    before = source
    for number, topology in enumerate(TOPOLOGIES):
        there, back = tmp_path / f"there-{number}", tmp_path / f"back-{number}"
        report = nf.convert(before, there, topology=topology, target=_target(source))
        assert report.plan.model_class == "NanotronFastConfig"
        assert nf.verify(source, there, logits=number == 1).equal
        is_alone = number % 2 == 1
        if is_alone:  # model_config.json says it all
            (there / "nanotron_fast.json").unlink()
        nf.convert(there, back)
        assert read_tensors(back) == tensors
        if not is_alone:
            assert as_dict(back) == config
            # Key for key.
            said = json.loads((source / "config.json").read_text())
            kept = json.loads((back / "config.json").read_text())
            assert kept == said


def _target(source: Path) -> str | None:
    """Families that no class of Nanotron's can load need no word."""
    kind = json.loads((source / "config.json").read_text())["model_type"]
    return "nanotron-fast" if kind in ("mistral", "qwen2", "qwen2_moe") else None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_correction_bias_comes_back_in_its_own_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save("deepseek_v3", tmp_path / "hf", dtype, correction_bias=dtype)
    nf.convert(source, tmp_path / "there", topology=Topology(tp=2, pp=2))
    nf.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)
