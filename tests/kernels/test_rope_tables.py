"""rope_tables against what transformers computes for the same configuration."""

from __future__ import annotations

import pytest
import torch

from nanotron_fast.kernels.rope.tables import rope_frequencies, rope_tables

_transformers = pytest.importorskip("transformers", reason="transformers is not installed")
_utils = pytest.importorskip("transformers.modeling_rope_utils")
_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
ROPE_INIT_FUNCTIONS = _utils.ROPE_INIT_FUNCTIONS
LlamaRotaryEmbedding = _llama.LlamaRotaryEmbedding

HEAD_DIM = 64
MAX_POSITIONS = 128
# The corners of each scaling. Every factor is the ratio of the two contexts, where there are two:
# only then do transformers 4 and 5 agree.
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, as DeepSeek": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    "yarn, as gpt-oss": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "yarn, a ramp of no length": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 1,
        "beta_slow": 1,
        "truncate": False,
        "attention_factor": 0.75,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(32)],
        "long_factor": [1.0 + 0.5 * i for i in range(32)],
        "original_max_position_embeddings": 32,
    },
    "longrope, all stated": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 32,
        "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 64,
        "factor": 2.0,
        "attention_factor": 1.25,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def configuration(scaling, theta=10000.0, share=1.0):
    """A configuration as any transformers takes it: what belongs to two places is in both."""
    outside = {"partial_rotary_factor": share}
    if "original_max_position_embeddings" in scaling:
        outside["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return _transformers.LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=theta,
        rope_scaling=dict(scaling),
        **outside,
    )


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("seq_len", [32, 4 * MAX_POSITIONS])
@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "default"])
def test_frequencies_are_those_of_transformers(name, seq_len, share) -> None:
    scaling = dict(SCALINGS[name])
    for key in scaling.keys() & {"short_factor", "long_factor"}:
        scaling[key] = scaling[key][: int(32 * share)]
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](
        configuration(scaling, 500000.0, share), "cpu", seq_len=seq_len
    )
    frequencies, attention_factor = rope_frequencies(
        HEAD_DIM,
        500000.0,
        scaling,
        partial_rotary_factor=share,
        max_position_embeddings=MAX_POSITIONS,
        seq_len=seq_len,
    )
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, expected)
    assert attention_factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_a_model(name) -> None:
    """At positions past the context, and through every factor that a model applies."""
    num_positions = 2 * MAX_POSITIONS
    scaling = SCALINGS[name]
    rotary = LlamaRotaryEmbedding(configuration(scaling))
    theirs = rotary(torch.zeros(1), torch.arange(num_positions)[None])
    ours = rope_tables(
        HEAD_DIM, num_positions, scaling=scaling, max_position_embeddings=MAX_POSITIONS
    )
    # dynamic takes its base from a tensor there, that is in fp32.
    tolerance = 1e-4 if name == "dynamic" else 1e-6
    for table, expected in zip(ours, theirs, strict=True):
        assert table.dtype == torch.float32
        doubled = torch.cat((table, table), -1)
        torch.testing.assert_close(doubled, expected[0], rtol=0, atol=tolerance)


def test_proportional() -> None:
    if "proportional" not in ROPE_INIT_FUNCTIONS:
        pytest.skip("this transformers has no proportional rope")
    scaling = {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.25}
    expected, _ = ROPE_INIT_FUNCTIONS["proportional"](configuration(scaling), "cpu")
    frequencies, attention_factor = rope_frequencies(HEAD_DIM, 10000.0, scaling)
    assert torch.equal(frequencies, expected)
    assert attention_factor == 1.0
    assert torch.count_nonzero(frequencies) == 8


def test_both_spellings_of_a_scaling() -> None:
    old = {"type": "linear", "factor": 2.0}
    new = {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 500000.0,
        "partial_rotary_factor": 0.5,
    }
    a = rope_tables(32, 9, 500000.0, old, partial_rotary_factor=0.5)
    # What the dictionary states goes before the arguments.
    b = rope_tables(32, 9, 10000.0, new)
    assert a[0].shape == (9, 8)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], rope_tables(32, 9, 10000.0, old, partial_rotary_factor=0.5)[0])
    phi = {key: SCALINGS["longrope"][key] for key in SCALINGS["longrope"] if key != "rope_type"}
    a = rope_tables(64, 9, scaling=SCALINGS["longrope"], max_position_embeddings=MAX_POSITIONS)
    b = rope_tables(64, 9, scaling={"type": "su", **phi}, max_position_embeddings=MAX_POSITIONS)
    assert torch.equal(a[0], b[0])


def test_the_length_decides() -> None:
    """Tables of the same positions, for short and for long sequences."""
    for name in ("dynamic", "longrope"):
        short, long = (
            rope_tables(
                HEAD_DIM,
                16,
                scaling=SCALINGS[name],
                max_position_embeddings=MAX_POSITIONS,
                seq_len=seq_len,
            )[1]
            for seq_len in (16, 512)
        )
        assert not torch.allclose(short[1:], long[1:])


def test_the_scaling_is_left_as_it_was_and_tables_go_where_asked() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    cos, sin = rope_tables(16, 4, scaling=scaling, device="meta")
    assert scaling == {"rope_type": "linear", "factor": 2.0}
    assert cos.device.type == sin.device.type == "meta"
    assert rope_tables(16, 0)[0].shape == (0, 8)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown rope scaling 'ntk': known are default, linear"):
        rope_tables(16, 4, scaling={"type": "ntk", "factor": 2.0})
    with pytest.raises(ValueError, match=r"'linear' needs 'factor'; it has \['type'\]"):
        rope_tables(16, 4, scaling={"type": "linear"})
    with pytest.raises(ValueError, match=r"'dynamic' needs max_position_embeddings"):
        rope_tables(16, 4, scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match=r"'longrope': 32 values in 'short_factor' for 8"):
        rope_tables(16, 4, scaling=SCALINGS["longrope"])
    with pytest.raises(ValueError, match=r"several layer types: pass one of \['full_attention'\]"):
        rope_tables(16, 4, scaling={"full_attention": {"rope_type": "default"}})
    with pytest.raises(ValueError, match=r"0 rotary dimensions of head_dim 16"):
        rope_tables(16, 4, partial_rotary_factor=0.01)
    with pytest.raises(ValueError, match=r"32 rotary dimensions of head_dim 16"):
        rope_tables(16, 4, partial_rotary_factor=2.0)
