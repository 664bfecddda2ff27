"""A family that is not built in, added from outside by a table, as docs/adding-a-family.md says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import nanotron_fast as nf
from nanotron_fast import families
from nanotron_fast.families.rules import Copy, Fuse
from nanotron_fast.formats.huggingface.checkpoint import layout_shards
from nanotron_fast.formats.nanotron.classes import LLAMA_CONFIG
from nanotron_fast.moves.dtypes import Dtype

BLOCK = "model.decoder.{layer}.pp_block."
HEADS = (("heads", "head_dim"), ("kv_heads", "head_dim"), ("kv_heads", "head_dim"))
ROTARY = (("rotary_first", "rotary_end"), ("rotary_first", "rotary_end"), None)
EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
MADE_UP = families.Family(
    name="madeup",
    architecture="MadeUpForCausalLM",
    model_class=LLAMA_CONFIG,
    keys={"num_layers": "depth", "hidden_size": "width"},
    defaults={**families.family_named("llama").defaults, "tie_word_embeddings": True},
    rules=(
        Copy("embed", EMBEDDING, rows="vocab", columns="hidden", split="rows", block="embedding"),
        Copy("b.{layer}.n1", BLOCK + "input_layernorm.weight", rows="hidden"),
        Copy("b.{layer}.n2", BLOCK + "post_attention_layernorm.weight", rows="hidden"),
        Copy(
            "b.{layer}.out",
            BLOCK + "attn.o_proj.weight",
            rows="hidden",
            columns=("heads", "head_dim"),
            split="columns",
        ),
        Fuse(
            ("b.{layer}.query", "b.{layer}.key", "b.{layer}.value"),
            BLOCK + "attn.qkv_proj.weight",
            rows=HEADS,
            columns="hidden",
            rotary=ROTARY,
        ),
        Copy("norm", "model.final_layer_norm.pp_block.weight", rows="hidden", block="norm"),
    ),
)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> families.Family:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    families.register(MADE_UP)
    return MADE_UP


def make(root: Path) -> Path:
    config = {
        "model_type": "madeup",
        "width": 32,
        "depth": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 40,
    }
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    shapes = {"embed": (40, 32), "norm": (32,)}
    for layer in range(3):
        shapes |= {f"b.{layer}.n1": (32,), f"b.{layer}.n2": (32,)}
        shapes |= {f"b.{layer}.query": (32, 32), f"b.{layer}.out": (32, 32)}
        shapes |= {f"b.{layer}.key": (16, 32), f"b.{layer}.value": (16, 32)}
    tensors = [(name, Dtype.BF16, shape) for name, shape in shapes.items()]
    (file,), _ = layout_shards(tensors, 10**9)
    data = np.random.default_rng(0).bytes(file.size_bytes - len(file.header))
    (root / file.name).write_bytes(file.header + data)
    return root


def test_a_made_up_family_converts_both_ways(tmp_path: Path, registered: families.Family) -> None:
    hf = make(tmp_path / "hf")
    nf.convert(hf, tmp_path / "there", topology=nf.Topology(tp=2, pp=2), rope_interleaved=True)
    nf.convert(tmp_path / "there", tmp_path / "back")
    assert nf.verify(hf, tmp_path / "there").equal
    assert nf.verify(hf, tmp_path / "back").equal
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["depth"], config["width"]) == ("madeup", 3, 32)


def test_a_name_is_taken_once(registered: families.Family) -> None:
    families.register(registered)
    with pytest.raises(ValueError, match="'madeup' is there already"):
        families.register(dataclasses.replace(registered, architecture="Other"))
