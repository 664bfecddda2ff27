"""What a comparison finds, and what it counts as equal."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.verify import LogitsReport, Verification
from nanotron_fast.errors import MissingPackageError, UnsupportedModelError
from nanotron_fast.formats.safetensors import build_header, read_header
from nanotron_fast.moves.dtypes import Dtype
from tests.modelzoo import make

LAYER = "model/model/decoder/{}/pp_block"


def convert(
    golden: Path, case: str, out: Path, tp: int = 1, pp: int = 1, **choices: object
) -> Path:
    nf.convert(golden / case / "hf", out, topology=nf.Topology(tp=tp, pp=pp), **choices)
    return out


def data_of(path: Path) -> tuple[int, bytearray]:
    """A file's bytes, and where its tensor starts."""
    header = read_header(path)
    return header.tensors["data"].begin_bytes, bytearray(path.read_bytes())


@pytest.mark.parametrize("case", ["llama_untied", "llama_tied", "qwen2", "qwen2_moe", "starcoder2"])
def test_every_pair_of_formats_and_topologies_is_equal(
    case: str, tmp_path: Path, golden: Path
) -> None:
    sides = [
        golden / case / "hf",
        convert(golden, case, tmp_path / "a", tp=2, pp=2),
        convert(golden, case, tmp_path / "b", tp=4, pad_vocab_to_multiple_of=24),
        convert(golden, case, tmp_path / "c", rope_interleaved=case != "starcoder2"),
    ]
    for a, b in itertools.product(sides, sides):
        found = nf.verify(a, b)
        assert found.equal, (a, b, found.differing)
        assert found.tensors_compared >= 38


@pytest.mark.parametrize("offset", [0, 1, -1])
@pytest.mark.parametrize("name", ["attn/o_proj", "attn/qkv_proj", "mlp/down_proj"])
def test_a_flipped_bit_is_found(name: str, offset: int, tmp_path: Path, golden: Path) -> None:
    out = convert(golden, "llama_untied", tmp_path / "out", tp=2)
    path = sorted((out / LAYER.format(2) / name).iterdir())[1]
    start, data = data_of(path)
    data[offset if offset < 0 else start + offset] ^= 0x10
    path.write_bytes(data)
    found = nf.verify(golden / "llama_untied" / "hf", out)
    assert not found.equal
    (difference,) = found.differing
    assert "layers.2." in difference.name
    assert difference.reason.startswith("1 of ")


def test_swapped_layers_are_found(tmp_path: Path, golden: Path) -> None:
    out = convert(golden, "llama_untied", tmp_path / "out", tp=2)
    first, second = out / LAYER.format(0), out / LAYER.format(1)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    found = nf.verify(golden / "llama_untied" / "hf", out)
    assert {name.split(".")[2] for name in (item.name for item in found.differing)} == {"0", "1"}


def test_a_transposed_expert_is_found(tmp_path: Path, golden: Path) -> None:
    out = convert(golden, "qwen2_moe", tmp_path / "out")
    path = out / LAYER.format(1) / "mlp/experts/model_merged_gate_up_proj.safetensors"
    start, data = data_of(path)
    _, rows, columns = read_header(path).tensors["data"].shape
    assert rows == columns
    size = 2 * rows * columns
    block = data[start + size : start + 2 * size]
    transposed = bytearray(size)
    for i, j in itertools.product(range(rows), range(columns)):
        a, b = 2 * (i * columns + j), 2 * (j * columns + i)
        transposed[b : b + 2] = block[a : a + 2]
    data[start + size : start + 2 * size] = transposed
    path.write_bytes(data)
    found = nf.verify(golden / "qwen2_moe" / "hf", out)
    assert {item.name for item in found.differing} == {
        f"model.layers.1.mlp.experts.1.{kind}_proj.weight" for kind in ("gate", "up")
    }


def test_different_dtypes_are_compared_after_a_cast(tmp_path: Path, golden: Path) -> None:
    wide = convert(golden, "llama_untied", tmp_path / "wide", dtype="fp32")
    for a, b, label in (
        (golden / "llama_untied" / "hf", wide, "B"),
        (wide, golden / "llama_untied" / "hf", "A"),
    ):
        found = nf.verify(a, b)
        assert found.equal
        assert found.casts == (f"{label} fp32 -> bf16 (39 tensors)",)


def test_padding_that_is_not_zero_is_found(tmp_path: Path, golden: Path) -> None:
    out = convert(golden, "llama_untied", tmp_path / "out", pad_vocab_to_multiple_of=100)
    (path,) = (out / "model/model/lm_head/pp_block").iterdir()
    _, data = data_of(path)
    data[-1] = 1
    path.write_bytes(data)
    (difference,) = nf.verify(golden / "llama_untied" / "hf", out).differing
    assert difference.name == "lm_head.weight (padding)"


def test_a_config_that_computes_something_else_is_found(tmp_path: Path, golden: Path) -> None:
    out = convert(golden, "llama_untied", tmp_path / "out")
    path = out / "model_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rope_theta": 500000.0}))
    (difference,) = nf.verify(golden / "llama_untied" / "hf", out).differing
    assert difference.name == "config: rope_theta"
    assert difference.reason == "10000.0 in A, 500000.0 in B"


def test_another_architecture_is_different(tmp_path: Path, golden: Path) -> None:
    out = convert(golden, "qwen2", tmp_path / "out")
    found = nf.verify(golden / "llama_untied" / "hf", out)
    assert not found.equal
    assert "config: has_qkv_bias" in {item.name for item in found.differing}


def test_a_tensor_that_one_side_lacks_is_found(tmp_path: Path, golden: Path) -> None:
    out = convert(golden, "llama_untied", tmp_path / "out")
    shutil.rmtree(out / LAYER.format(3) / "input_layernorm")
    found = nf.verify(golden / "llama_untied" / "hf", out)
    assert [item.name for item in found.differing] == ["model.layers.3.input_layernorm.weight"]
    assert "is missing" in found.differing[0].reason


@pytest.mark.parametrize("case", ["llama_tied", "qwen2_moe"])
def test_logits_agree(case: str, tmp_path: Path, golden: Path) -> None:
    out = convert(golden, case, tmp_path / "out", tp=2, rope_interleaved=True)
    found = nf.verify(golden / case / "hf", out, logits=True)
    assert found.equal
    assert found.logits is not None
    assert found.logits.max_difference <= 1e-5 * found.logits.max_magnitude
    assert found.logits.num_same_argmax == found.logits.num_tokens == 64


def test_logits_differ_where_a_weight_does(tmp_path: Path, golden: Path) -> None:
    out = convert(golden, "llama_tied", tmp_path / "out")
    path = out / LAYER.format(0) / "input_layernorm/model_weight.safetensors"
    start, data = data_of(path)
    data[start + 1] ^= 0x40
    path.write_bytes(data)
    found = nf.verify(golden / "llama_tied" / "hf", out, logits=True)
    assert not found.equal
    assert found.logits is not None
    assert not found.logits.equal


@pytest.mark.parametrize("is_first", [True, False])
def test_padding_that_is_not_zero_is_found_on_either_side(
    is_first: bool, tmp_path: Path, golden: Path
) -> None:
    hf = golden / "llama_untied" / "hf"
    out = convert(golden, "llama_untied", tmp_path / "out", tp=2, pad_vocab_to_multiple_of=24)
    path = sorted((out / "model/model/lm_head/pp_block").iterdir())[-1]
    _, data = data_of(path)
    data[-1] ^= 0x10
    path.write_bytes(data)
    found = nf.verify(out, hf) if is_first else nf.verify(hf, out)
    assert [item.name for item in found.differing] == ["lm_head.weight (padding)"]


def test_padding_is_the_same_without_the_side_file(tmp_path: Path, golden: Path) -> None:
    a = convert(golden, "llama_untied", tmp_path / "a", pad_vocab_to_multiple_of=24)
    b = tmp_path / "b"
    shutil.copytree(a, b)
    (b / "nanotron_fast.json").unlink()
    c = convert(golden, "llama_untied", tmp_path / "c")
    for first, second in itertools.permutations([a, b, c], 2):
        assert nf.verify(first, second).equal, (first, second)


@pytest.mark.parametrize(
    ("hf", "nanotron"), [("qwen2", "llama_untied"), ("llama_untied", "starcoder2")]
)
def test_a_class_that_cannot_hold_the_family_is_a_difference(
    hf: str, nanotron: str, tmp_path: Path, golden: Path
) -> None:
    out = convert(golden, nanotron, tmp_path / "out")
    found = nf.verify(golden / hf / "hf", out)
    assert "config: has_qkv_bias" in [item.name for item in found.differing]


def test_logits_of_an_incomplete_checkpoint_are_not_asked_for(tmp_path: Path, golden: Path) -> None:
    out = convert(golden, "llama_untied", tmp_path / "out")
    shutil.rmtree(out / LAYER.format(0) / "input_layernorm")
    found = nf.verify(golden / "llama_untied" / "hf", out, logits=True)
    assert [item.name for item in found.differing] == ["model.layers.0.input_layernorm.weight"]
    assert found.logits is None


def test_heads_without_rotary_pairs_are_not_compared_in_part(tmp_path: Path) -> None:
    make("llama", hidden_size=24).save(tmp_path / "hf")
    nf.convert(tmp_path / "hf", tmp_path / "out")
    path = tmp_path / "out" / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_interleaved": True}))
    with pytest.raises(UnsupportedModelError, match="heads of 3 rows have no rotary pairs"):
        nf.verify(tmp_path / "hf", tmp_path / "out")


def test_logits_that_are_no_numbers_are_null_in_json() -> None:
    logits = LogitsReport(math.nan, math.inf, math.nan, 64, 3, ("one", "another"))
    found = Verification(False, 1, (), (), 2, logits)
    document = json.loads(json.dumps(found.to_json()), parse_constant=pytest.fail)
    assert document["logits"]["max_difference"] is None
    assert document["logits"]["equal"] is False


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_what_logits_need_is_asked_for_first(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"--logits needs {package}, not installed"):
        nf.verify("no-such-a", "no-such-b", logits=True)


def test_a_second_copy_of_a_tied_matrix_is_compared(tmp_path: Path) -> None:
    model = make("llama", tie_word_embeddings=True)
    embedding = model.tensors["model.embed_tokens.weight"]
    plain, same, other = tmp_path / "plain", tmp_path / "same", tmp_path / "other"
    model.save(plain)
    model.tensors["lm_head.weight"] = embedding
    model.save(same)
    model.tensors["lm_head.weight"] = embedding._replace(data=bytes(len(embedding.data)))
    model.save(other)
    assert nf.verify(plain, same).equal
    for a, b in ((plain, other), (other, plain), (other, same)):
        assert [item.name for item in nf.verify(a, b).differing] == ["lm_head.weight"]


def test_casts_are_chosen_tensor_by_tensor(tmp_path: Path, golden_hf: Path) -> None:
    """q in fp32 on one side and k on the other: each is compared in its narrower dtype."""
    sides = []
    for name in ("q_proj", "k_proj"):
        root = tmp_path / name
        root.mkdir()
        shutil.copy(golden_hf / "config.json", root)
        widen(golden_hf / "model.safetensors", root / "model.safetensors", name)
        sides.append(root)
    found = nf.verify(*sides)
    assert found.equal, found.differing
    assert found.casts == ("A fp32 -> bf16 (4 tensors)", "B fp32 -> bf16 (4 tensors)")


def widen(source: Path, target: Path, kind: str) -> None:
    """The same file with some tensors in fp32."""
    header, data = read_header(source), source.read_bytes()
    blobs: dict[str, tuple[Dtype, tuple[int, ...], bytes]] = {}
    for name, info in header.tensors.items():
        raw = data[info.begin_bytes : info.end_bytes]
        if kind in name:
            wide = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
            blobs[name] = Dtype.F32, info.shape, wide.tobytes()
        else:
            blobs[name] = Dtype.BF16, info.shape, raw
    head, _ = build_header([(name, blob[0], blob[1]) for name, blob in blobs.items()], {})
    target.write_bytes(head + b"".join(blob[2] for blob in blobs.values()))


def test_a_tensor_wider_than_its_neighbours_comes_back_as_it_was(
    tmp_path: Path, golden_hf: Path
) -> None:
    hf, there, back = tmp_path / "hf", tmp_path / "there", tmp_path / "back"
    hf.mkdir()
    shutil.copy(golden_hf / "config.json", hf)
    widen(golden_hf / "model.safetensors", hf / "model.safetensors", "q_proj")
    nf.convert(hf, there)
    nf.convert(there, back)
    before, after = (read_header(root / "model.safetensors").tensors for root in (hf, back))
    assert {name: info.dtype for name, info in before.items()} == {
        name: info.dtype for name, info in after.items()
    }
    found = nf.verify(hf, back)
    assert found.equal
    assert found.casts == ()
