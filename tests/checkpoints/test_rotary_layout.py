"""How q and k lie in a Nanotron checkpoint, where its configuration says it and where it does not.

Nanotron's Llama rotated neighbours, without an option, until September 2024.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nanotron_fast as nf
from nanotron_fast.cli.scripts.convert_nanotron_to_hf import main as to_hf_script
from nanotron_fast.errors import ConfigError, UnsupportedModelError
from tests.modelzoo import Model, make, read_tensors

# What the class got after version 1.4 was new.
LATER = ("rope_interleaved", "attention_bias", "_attn_implementation", "z_loss_enabled")


def saved_in_2024(
    tmp_path: Path, drop: tuple[str, ...] = LATER, **choices: Any
) -> tuple[Model, Path]:
    """A model, and a Nanotron checkpoint of it whose model_config.json lacks some keys."""
    model = make("llama", rope_theta=5e5)
    nf.convert(model.save(tmp_path / "hf"), tmp_path / "there", **choices)
    (tmp_path / "there" / "nanotron_fast.json").unlink()
    path = tmp_path / "there" / "model_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: config[key] for key in config if key not in drop}))
    return model, tmp_path / "there"


def rotary(report: nf.Report) -> list[str]:
    """The warnings that are of rotary pairs: others say what else Nanotron did not keep."""
    return [text for text in report.plan.warnings if "no rope_interleaved" in text]


@pytest.mark.parametrize("drop", [LATER, ("rope_interleaved",)])
def test_a_llama_without_the_key_rotates_neighbours(drop: tuple[str, ...], tmp_path: Path) -> None:
    model, there = saved_in_2024(tmp_path, drop, rope_interleaved=True)
    report = nf.convert(there, tmp_path / "back")
    assert read_tensors(tmp_path / "back") == model.tensors
    (warning,) = rotary(report)
    assert "--no-rope-interleaved" in warning
    # Saying so makes it sure.
    report = nf.convert(there, tmp_path / "sure", rope_interleaved=True)
    assert read_tensors(tmp_path / "sure") == model.tensors
    assert rotary(report) == []


def test_the_override_reads_halves(tmp_path: Path) -> None:
    model, there = saved_in_2024(tmp_path)
    report = nf.convert(there, tmp_path / "back", rope_interleaved=False)
    assert read_tensors(tmp_path / "back") == model.tensors
    assert rotary(report) == []
    nf.convert(there, tmp_path / "wrong")
    assert read_tensors(tmp_path / "wrong") != model.tensors


@pytest.mark.parametrize("written", [True, False])
def test_the_override_wins_over_what_is_written(written: bool, tmp_path: Path) -> None:
    model, there = saved_in_2024(tmp_path, (), rope_interleaved=written)
    path = there / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_interleaved": not written}))
    nf.convert(there, tmp_path / "back", rope_interleaved=written)
    assert read_tensors(tmp_path / "back") == model.tensors


def test_verify_and_inspect(tmp_path: Path) -> None:
    _, there = saved_in_2024(tmp_path)
    hf = tmp_path / "hf"
    found = nf.verify(hf, there)
    assert not found.equal
    assert found.warnings[0].startswith("B: model_config.json: no rope_interleaved")
    found = nf.verify(hf, there, rope_interleaved=False)
    assert found.equal
    assert found.warnings == ()
    shown = nf.inspect(there)
    assert shown.rope_interleaved is True
    assert "no rope_interleaved" in shown.warnings[0]
    assert nf.inspect(there, rope_interleaved=False).rope_interleaved is False
    # Of two in Nanotron's format, only the one that does not say is meant.
    nf.convert(hf, tmp_path / "new", rope_interleaved=True)
    for a, b in ((there, tmp_path / "new"), (tmp_path / "new", there)):
        assert not nf.verify(a, b).equal
        assert nf.verify(a, b, rope_interleaved=False).equal


def test_load_into(tmp_path: Path) -> None:
    _, there = saved_in_2024(tmp_path)
    shapes = nf.inspect(there)
    assert shapes.spec is not None
    halves = _empty(there)
    with pytest.warns(UserWarning, match="no rope_interleaved"):
        report = nf.load_into(halves, there, topology=nf.Topology(), rank=0, rope_interleaved=False)
    assert len(report.warnings) == 1
    told = _empty(there)
    nf.load_into(
        told,
        there,
        topology=nf.Topology(),
        rank=0,
        rope_interleaved=False,
        stored_rope_interleaved=False,
    )
    name = "model.decoder.0.pp_block.attn.qkv_proj.weight"
    assert not torch.equal(halves[name], told[name])
    from_hf = _empty(there)
    nf.load_into(from_hf, tmp_path / "hf", topology=nf.Topology(), rank=0)
    assert all(torch.equal(from_hf[key], told[key]) for key in told)
    with pytest.raises(ConfigError, match=r"stored_rope_interleaved: .* is a Hugging Face"):
        nf.load_into(
            told, tmp_path / "hf", topology=nf.Topology(), rank=0, stored_rope_interleaved=True
        )


def _empty(there: Path) -> dict[str, torch.Tensor]:
    from nanotron_fast.formats.nanotron.checkpoint import read_nanotron

    return {
        name: torch.zeros(shards[0].info.shape, dtype=torch.bfloat16)
        for name, shards in read_nanotron(there).params.items()
    }


def test_a_qwen2_without_the_key_rotates_halves(tmp_path: Path) -> None:
    """That class always had the field; and a Starcoder2 never has neighbours."""
    for family in ("qwen2", "starcoder2"):
        model = make(family, num_hidden_layers=2)
        root = tmp_path / family
        nf.convert(model.save(root / "hf"), root / "there")
        path = root / "there" / "model_config.json"
        config = json.loads(path.read_text())
        config.pop("rope_interleaved", None)
        path.write_text(json.dumps(config))
        report = nf.convert(root / "there", root / "back")
        assert read_tensors(root / "back") == model.tensors
        assert rotary(report) == []
    with pytest.raises(UnsupportedModelError, match="--rope-interleaved: Starcoder2"):
        nf.convert(root / "there", root / "pairs", rope_interleaved=True)


def test_the_script_that_nanotrons_users_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, there = saved_in_2024(tmp_path)
    words = ["script", f"--checkpoint_path={there}", f"--save_path={tmp_path / 'back'}"]
    monkeypatch.setattr("sys.argv", [*words, "--no-rope-interleaved"])
    with pytest.raises(SystemExit, match=r"^0$"):
        to_hf_script()
    assert read_tensors(tmp_path / "back") == model.tensors
    assert "no rope_interleaved" not in capsys.readouterr().err
