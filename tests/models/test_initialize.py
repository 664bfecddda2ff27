"""Random weights: their spread by Nanotron's rules, and that no topology shows in them."""

from __future__ import annotations

import math

import pytest
import torch

from nanotron_fast.model.spec import Attention, Dense, Layer, ModelSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.models import Architecture, Decoder, build, facts_of, initialize
from nanotron_fast.models.initial_weights import mup_learning_rate_factor

BLOCK = "model.decoder.0.pp_block."
EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"


def spec(**changes: object) -> ModelSpec:
    layer = Layer(Attention(4, 2, 32, (0, 32), has_qkv_bias=True), Dense(256))
    fields = {
        "hidden_size": 128,
        "layers": (layer,) * 8,
        "intermediate_size": 256,
        "vocab_size": 512,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "norm_eps": 1e-6,
        "initializer_range": 0.02,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }
    return ModelSpec(**{**fields, **changes})


def spread(decoder: Decoder, name: str) -> float:
    return float(decoder.get_parameter(name).detach().std())


def test_matrices_are_normal_and_rows_scaled_by_the_depth() -> None:
    decoder = build(spec())
    assert spread(decoder, EMBEDDING) == pytest.approx(0.02, rel=0.03)
    assert spread(decoder, f"{BLOCK}attn.qkv_proj.weight") == pytest.approx(0.02, rel=0.03)
    assert spread(decoder, f"{BLOCK}mlp.down_proj.weight") == pytest.approx(0.02 / 4, rel=0.03)
    assert bool((decoder.get_parameter(f"{BLOCK}input_layernorm.weight") == 1).all())
    assert bool((decoder.get_parameter(f"{BLOCK}attn.qkv_proj.bias") == 0).all())
    initialize(decoder, std=0.1, scales_rows=False)
    assert spread(decoder, f"{BLOCK}mlp.down_proj.weight") == pytest.approx(0.1, rel=0.03)


def test_mup_goes_by_the_fans_of_the_whole_matrix() -> None:
    architecture = Architecture.of_spec(spec())
    for tp in (1, 2):
        decoder = Decoder(architecture, topology=Topology(tp=tp), device="cpu")
        initialize(decoder, is_mup=True)
        down = math.sqrt(1 / 256) * math.sqrt(128 / 256)
        gate_up = math.sqrt(1 / 128)
        assert spread(decoder, EMBEDDING) == pytest.approx(1.0, rel=0.03)
        assert spread(decoder, f"{BLOCK}mlp.down_proj.weight") == pytest.approx(down, rel=0.03)
        assert spread(decoder, f"{BLOCK}mlp.gate_up_proj.weight") == pytest.approx(
            gate_up, rel=0.03
        )
        facts = facts_of(decoder)
        factors = {name: mup_learning_rate_factor(each) for name, each in facts.items()}
        assert factors[f"{BLOCK}mlp.down_proj.weight"] == 0.5
        assert factors[f"{BLOCK}mlp.gate_up_proj.weight"] == 4.0
        assert factors[EMBEDDING] == factors[f"{BLOCK}input_layernorm.weight"] == 1.0


def test_stages_and_their_tied_copies_start_from_the_whole() -> None:
    whole = build(spec(), seed=5)
    topology = Topology(pp=2)
    stages = [build(spec(), topology=topology, rank=rank, seed=5) for rank in range(2)]
    for stage in stages:
        for name, facts in facts_of(stage).items():
            is_copy = facts.tied_with == EMBEDDING
            expected = whole.get_parameter(EMBEDDING if is_copy else name)
            assert torch.equal(stage.get_parameter(name), expected), name
    other = build(spec(), seed=6)
    assert not torch.equal(other.get_parameter(EMBEDDING), whole.get_parameter(EMBEDDING))
