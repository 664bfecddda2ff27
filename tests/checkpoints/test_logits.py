"""`verify --logits`: a Nanotron checkpoint run by Nanotron's rules, beside transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nanotron_fast as nf
from nanotron_fast.checkpoints.activations import ACTIVATIONS
from nanotron_fast.checkpoints.logits import compare_logits
from nanotron_fast.checkpoints.nanotron_forward import NanotronForward
from nanotron_fast.checkpoints.options import Options
from nanotron_fast.cli.commands import app
from nanotron_fast.errors import CheckpointError, ConfigError
from nanotron_fast.formats.nanotron.checkpoint import read_nanotron
from nanotron_fast.formats.safetensors import read_header
from nanotron_fast.model.spec import NANOTRON_ACTIVATIONS
from tests.modelzoo import make, read_file, safetensors_bytes

LAYER = "model/model/decoder/{}/pp_block"
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Name -> family and changes to its config. Windows are shorter than what is run.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 500.0}),
    "mistral with a window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "smollm3": ("smollm3", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, some layers": ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    "starcoder2 with a window": ("starcoder2", {"sliding_window": 9}),
}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("case", ["llama_untied", "llama_tied", "qwen2", "qwen2_moe", "starcoder2"])
def test_the_forward_is_what_was_recorded(case: str, tmp_path: Path, golden: Path) -> None:
    recorded = json.loads((golden / case / "reference_logits.json").read_text())
    nf.convert(golden / case / "hf", tmp_path / "out", topology=nf.Topology(tp=2))
    logits = NanotronForward(read_nanotron(tmp_path / "out"))(torch.tensor(recorded["input_ids"]))
    expected = torch.tensor(recorded["logits_fp32_compute_last4"])
    torch.testing.assert_close(logits[:, -4:], expected, rtol=1e-4, atol=1e-4)
    assert logits.argmax(-1).tolist() == recorded["argmax"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_conversion_compute_the_same(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    hf, out = make(family, **changes).save(tmp_path / "hf"), tmp_path / "out"
    is_paired = family != "starcoder2"
    nf.convert(hf, out, topology=nf.Topology(tp=2, pp=2), rope_interleaved=is_paired)
    found = nf.verify(hf, out, logits=True)
    assert found.equal
    assert found.logits is not None
    assert 0 < found.logits.max_difference <= 1e-5 * found.logits.max_magnitude
    assert found.logits.programs[0] == "transformers"


# What needs this package's own class, each with all that the class can have.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "biases, head_dim and a scaling": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "rope_scaling": SCALING},
    ),
    "a window on some layers": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
    ),
    "starcoder2 without biases, untied": (
        "starcoder2",
        {"use_bias": False, "tie_word_embeddings": False},
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_our_own_class_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    family, changes = OWN[name]
    hf, out = make(family, **changes).save(tmp_path / "hf"), tmp_path / "out"
    nf.convert(hf, out, topology=nf.Topology(tp=2, pp=2), target="nanotron-fast")
    assert json.loads((out / "model_config.json").read_text())["is_nanotron_fast_config"]
    found = nf.verify(hf, out, logits=True)
    assert found.equal
    assert found.logits is not None
    assert found.logits.max_difference <= 1e-5 * found.logits.max_magnitude
    assert found.logits.num_same_argmax == found.logits.num_tokens
    assert found.logits.programs[1] == "this package's NanotronFastConfig in nanotron_fast.models"
    # The last layer of a stage without its output projection.
    attention = out / LAYER.format(2) / "attn"
    for path in [*attention.rglob("o_proj/*weight*"), *attention.rglob("dense/*weight*")]:
        info = read_header(path).tensors["data"]
        data = bytearray(path.read_bytes())
        data[info.begin_bytes : info.end_bytes] = bytes(info.end_bytes - info.begin_bytes)
        path.write_bytes(data)
    changed = nf.verify(hf, out, logits=True).logits
    assert changed is not None
    assert not changed.equal
    with pytest.raises(ConfigError, match=r"which nanotron_fast\.verify runs"):
        compare_logits(hf, out, Options(), has_casts=False)


def test_rope_scaling_is_honoured_for_nanotron_fast_alone(tmp_path: Path) -> None:
    hf = make("llama", rope_scaling=SCALING).save(tmp_path / "hf")
    nf.convert(hf, tmp_path / "out", target="nanotron-fast")
    found = nf.verify(hf, tmp_path / "out", logits=True)
    assert found.equal
    assert found.logits is not None
    assert found.logits.programs[1].endswith("rope_scaling honoured")
    # Stock Nanotron, which the checkpoint is for without the side file, ignores it.
    (tmp_path / "out" / "nanotron_fast.json").unlink()
    found = nf.verify(hf, tmp_path / "out", logits=True)
    assert found.differing == ()
    assert found.logits is not None
    assert not found.logits.equal
    assert not found.equal


def test_rows_laid_for_neighbours_under_a_config_of_halves(tmp_path: Path) -> None:
    """Every tensor of the right shape, a permutation of the right rows: the outputs show it."""
    hf, out = make("llama").save(tmp_path / "hf"), tmp_path / "out"
    nf.convert(hf, out, rope_interleaved=True)
    edit(out / "model_config.json", rope_interleaved=False)
    logits = compare_logits(hf, out, Options(), has_casts=False)
    assert not logits.equal
    assert logits.max_difference > 10 * logits.tolerance
    assert not nf.verify(hf, out, logits=True).equal


@pytest.mark.parametrize("name", ["mlp/gate_up_proj", "attn/qkv_proj"])
def test_two_halves_of_a_packed_matrix_swapped(name: str, tmp_path: Path) -> None:
    hf, out = make("llama").save(tmp_path / "hf"), tmp_path / "out"
    nf.convert(hf, out)
    (path,) = (out / LAYER.format(0) / name).iterdir()
    info = read_header(path).tensors["data"]
    data = bytearray(path.read_bytes())
    rows = np.frombuffer(bytes(data[info.begin_bytes : info.end_bytes]), np.uint16)
    half = len(rows) // 2
    data[info.begin_bytes : info.end_bytes] = np.concatenate((rows[half:], rows[:half])).tobytes()
    path.write_bytes(data)
    assert not compare_logits(hf, out, Options(), has_casts=False).equal


def test_shards_are_pasted_where_they_say_they_belong(tmp_path: Path) -> None:
    """Two ranks' files with each other's contents: what the metadata says counts."""
    hf, out = make("llama").save(tmp_path / "hf"), tmp_path / "out"
    nf.convert(hf, out, topology=nf.Topology(tp=2))
    first, second = sorted((out / LAYER.format(0) / "attn/qkv_proj").iterdir())
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert compare_logits(hf, out, Options(), has_casts=False).equal


def test_two_sides_of_one_format(tmp_path: Path) -> None:
    hf = make("llama").save(tmp_path / "hf")
    nf.convert(hf, tmp_path / "a", topology=nf.Topology(tp=2), pad_vocab_to_multiple_of=64)
    nf.convert(hf, tmp_path / "b", rope_interleaved=True)
    for a, b in ((hf, hf), (tmp_path / "a", tmp_path / "b")):
        found = nf.verify(a, b, logits=True)
        assert found.equal
        assert found.logits is not None
        assert found.logits.programs[0] == found.logits.programs[1]


def test_what_transformers_cannot_run_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, out = make("llama").save(tmp_path / "hf"), tmp_path / "out"
    nf.convert(hf, out)
    shutil.copytree(hf, tmp_path / "odd")
    edit(tmp_path / "odd" / "config.json", dtype="float7", torch_dtype="float7")
    with pytest.raises(ConfigError, match=r"--logits: transformers cannot run .*odd"):
        compare_logits(tmp_path / "odd", out, Options(), has_casts=False)
    capsys.readouterr()


def test_the_command_states_tolerance_difference_and_argmax(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, out = make("llama").save(tmp_path / "hf"), tmp_path / "out"
    nf.convert(hf, out)
    for words in ([], ["--json"]):
        app(["verify", str(hf), str(out), "--logits", *words], standalone_mode=False)
        said = capsys.readouterr().out
        if words:
            logits = json.loads(said)["logits"]
            assert logits["equal"]
            assert logits["argmax_agrees"]
            assert logits["num_same_argmax"] == 64
            assert 0 < logits["tolerance"] == pytest.approx(1e-4 * logits["max_magnitude"])
            assert logits["programs"][1] == "Nanotron's LlamaConfig in plain torch"
        else:
            assert "is allowed); the largest logit is at the same place for 64 of 64" in said
            assert "A by transformers, B by Nanotron's LlamaConfig in plain torch" in said


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("unsharded_shape", "(64, 96)", r"a shard of a tensor of \[64, 96\], and .* of \[64, 64\]"),
        ("unsharded_shape", "(64, 48)", r"of shape \[64, 32\], and .* of a tensor of \[64, 48\]"),
        ("local_global_slices_pairs", "nonsense", "holds 'nonsense', which is not a pair"),
    ],
)
def test_shards_that_cannot_be_put_together(
    key: str, text: str, message: str, tmp_path: Path, golden_hf: Path
) -> None:
    nf.convert(golden_hf, tmp_path / "out", topology=nf.Topology(tp=2))
    path = next((tmp_path / "out" / LAYER.format(0) / "attn" / "o_proj").glob("*tp-rank-1-of-2*"))
    tensors, metadata = read_file(path)
    path.write_bytes(safetensors_bytes(tensors.items(), {**(metadata or {}), key: text}))
    with pytest.raises(CheckpointError, match=f"{path.name}: .*{message}"):
        NanotronForward(read_nanotron(tmp_path / "out"))(torch.zeros(1, 4, dtype=torch.int64))


def test_every_activation_of_nanotron_is_there() -> None:
    assert ACTIVATIONS.keys() == NANOTRON_ACTIVATIONS
