"""A model in FP8 converts as the model that it is once dequantised, at every topology."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.cli.reporting import inspection_lines
from nanotron_fast.errors import CheckpointError, MissingPackageError, UnsupportedModelError
from tests.checkpoints.test_loading import check_ranks, converted
from tests.fp8 import (
    CONFIG,
    names_of_quantised,
    quantised,
    spread,
    stack_in_blocks,
    tensor_of,
    weights_of,
)
from tests.modelzoo import Model, Tensor, make, read_tensors
from tests.refusals import refused

# Blocks at the edges are cut short, and shards begin in the middle of one.
CUT = {
    "hidden_size": 192,
    "head_dim": 24,
    "intermediate_size": 328,
    "num_hidden_layers": 2,
}
WHOLE = {"hidden_size": 256, "head_dim": 32, "intermediate_size": 384, "num_hidden_layers": 1}
TOPOLOGIES = [Topology(tp=tp, pp=pp) for tp, pp in itertools.product((1, 2), (1, 2))]
EMBEDDING = "model.embed_tokens.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def saved(tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    """A quantised model, and the same one dequantised."""
    coded, plain = quantised(make("llama", **{**CUT, **changes}))
    return coded.save(tmp_path / "coded", shards=3), plain.save(tmp_path / "plain")


def contents(folder: Path) -> dict[str, bytes]:
    """What was written; config.yaml names the destination."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_it_converts_as_what_it_is_once_dequantised(topology: Topology, tmp_path: Path) -> None:
    coded, plain = saved(tmp_path)
    report = nf.convert(coded, tmp_path / "out", topology=topology)
    nf.convert(plain, tmp_path / "expected", topology=topology)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert "dequantised from fp8 (128x128 blocks)" in " ".join(report.plan.warnings)
    assert report.plan.dtype.short_name == "bf16"
    for one, other in ((coded, tmp_path / "out"), (tmp_path / "out", coded)):
        found = nf.verify(one, other)
        assert found.equal, found.differing
        label = "A" if one == coded else "B"
        assert found.casts == (f"{label} fp8 -> bf16 (14 tensors)",)
        assert any("dequantised from fp8 (128x128 blocks)" in each for each in found.warnings)


def test_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers loads what is quantised with a package that nothing else here needs."""
    coded, _ = saved(tmp_path, **WHOLE)
    nf.convert(coded, tmp_path / "out")
    found = nf.verify(coded, tmp_path / "out", logits=True)
    assert found.equal
    assert found.logits is not None
    monkeypatch.setitem(sys.modules, "accelerate", None)
    message = r"coded, whose .* needs accelerate, .*\[logits\]"
    with pytest.raises(MissingPackageError, match=message):
        nf.verify(coded, tmp_path / "out", logits=True)


def test_values_are_those_of_transformers(tmp_path: Path) -> None:
    """Which dequantises where blocks are whole."""
    coded, plain = quantised(make("llama", **WHOLE))
    for name in names_of_quantised(coded):
        codes = _torch(coded.tensors[name])
        scales = weights_of(coded.tensors[f"{name}_scale_inv"])
        values = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
        assert plain.tensors[name] == tensor_of(values)
    source = coded.save(tmp_path / "coded")
    nf.convert(source, tmp_path / "there", topology=Topology(tp=2))
    nf.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == plain.tensors
    assert "quantization_config" not in (tmp_path / "back" / "config.json").read_text()


@pytest.mark.parametrize("is_stacked", [False, True], ids=["separate", "stacked"])
def test_experts_are_transposed_out_of_blocks(is_stacked: bool, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "moe_intermediate_size": 136, "hidden_size": 192}
    model = make("qwen2_moe", **sizes)
    coded, plain = quantised(model)
    if is_stacked:
        # As transformers 5 saves them: a grid of scales for each expert.
        kept = {name for name in model.tensors if ".mlp.experts." not in name}
        coded.tensors = {
            name: tensor
            for name, tensor in coded.tensors.items()
            if name.removesuffix("_scale_inv") in kept
        }
        plain.tensors = {name: plain.tensors[name] for name in kept}
        for name, tensor in model.stacked().items():
            if name in kept:
                continue
            codes, scales = stack_in_blocks(weights_of(tensor))
            coded.tensors[name] = tensor_of(codes)
            coded.tensors[f"{name}_scale_inv"] = tensor_of(scales)
            wide = [spread(scale, *codes.shape[1:]) for scale in scales]
            plain.tensors[name] = tensor_of((codes.float() * torch.stack(wide)).bfloat16())
        for each in (coded, plain):
            each.tensors = dict(sorted(each.tensors.items(), key=lambda item: item[0] != EMBEDDING))
    topology = Topology(tp=2)
    nf.convert(coded.save(tmp_path / "coded"), tmp_path / "out", topology=topology)
    nf.convert(plain.save(tmp_path / "plain"), tmp_path / "expected", topology=topology)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert nf.verify(tmp_path / "out", tmp_path / "coded").equal


def _torch(tensor: Tensor) -> torch.Tensor:
    codes = torch.frombuffer(bytearray(tensor.data), dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).view(tensor.shape)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_product_is_rounded_once_to_the_dtype_that_is_asked_for(
    dtype: str, tmp_path: Path
) -> None:
    coded, _ = quantised(make("llama", **WHOLE))
    nf.convert(coded.save(tmp_path / "coded"), tmp_path / "there", dtype=dtype)
    nf.convert(tmp_path / "there", tmp_path / "back", dtype=dtype)
    wanted = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    found = read_tensors(tmp_path / "back")
    for name in names_of_quantised(coded):
        scales = weights_of(coded.tensors[f"{name}_scale_inv"])
        values = Fp8Dequantize(None)._dequantize_one(_torch(coded.tensors[name]), scales, wanted)
        assert found[name] == tensor_of(values)


def test_a_rank_loads_its_share(tmp_path: Path) -> None:
    coded, plain = saved(tmp_path)
    topology = Topology(tp=2, pp=2)
    _, ranks = converted(plain, tmp_path, topology)
    with pytest.warns(UserWarning, match="dequantised from fp8"):
        check_ranks(ranks, coded, topology, staging_bytes=5000)


def test_other_published_forms(tmp_path: Path) -> None:
    coded, plain = saved(tmp_path)
    nf.convert(coded, tmp_path / "dcp", to="dcp")
    assert nf.verify(tmp_path / "dcp", plain, like=plain).equal
    assert nf.verify(coded, plain).equal
    found = nf.verify(coded, coded)
    assert not found.equal
    reasons = {each.reason for each in found.differing}
    assert reasons == {
        "fp8 in A, fp8 in B: two quantised tensors are not compared; convert one of the models"
    }


def test_a_difference_is_found(tmp_path: Path) -> None:
    coded, plain = quantised(make("llama", **WHOLE))
    data = bytearray(plain.tensors[Q_PROJ].data)
    data[2 * (130 * 256 + 7)] ^= 1
    plain.tensors[Q_PROJ] = plain.tensors[Q_PROJ]._replace(data=bytes(data))
    found = nf.verify(coded.save(tmp_path / "a"), plain.save(tmp_path / "b"))
    assert [(each.name, each.reason.split(",")[0]) for each in found.differing] == [
        (Q_PROJ, "1 of 65536 elements differ")
    ]


def one_scale(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> tuple[Model, Model]:
    """A model whose scales have another shape, name and dtype; activations have theirs."""
    model = make("llama", **WHOLE)
    config = {"activation_scheme": "static", "quant_method": "fp8", "weight_block_size": None}
    coded, plain = dict(model.tensors), dict(model.tensors)
    for key, tensor in model.tensors.items():
        if not key.endswith("_proj.weight"):
            continue
        weight = weights_of(tensor).float()
        largest = weight.abs().amax(1, keepdim=True) if "rows" in shape else weight.abs().max()
        scales = (largest / 448).to(dtype)
        codes = (weight / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        counts = [weight.shape[0] if size == "rows" else size for size in shape]
        coded[key] = tensor_of(codes)
        prefix = key.removesuffix("weight")
        coded[prefix + name] = tensor_of(scales.reshape(counts))
        coded[prefix + "input_scale"] = tensor_of(torch.ones(1))
        plain[key] = tensor_of((codes.float() * scales.float()).bfloat16())
    stated = {**model.config, "torch_dtype": "bfloat16"}
    return (
        Model("llama", {**stated, "quantization_config": config}, coded),
        Model("llama", stated, plain),
    )


@pytest.mark.parametrize(
    ("shape", "name", "dtype"),
    [
        ((), "weight_scale_inv", torch.bfloat16),
        ((1,), "weight_scale", torch.float32),
        ((1, 1), "scale", torch.float16),
        (("rows", 1), "weight_scale", torch.float32),
        (("rows",), "qscale_weight", torch.bfloat16),
    ],
    ids=str,
)
def test_a_scale_for_each_tensor_or_row(
    shape: Any, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    coded, plain = one_scale(shape, name, dtype)
    report = nf.convert(coded.save(tmp_path / "coded"), tmp_path / "out", topology=Topology(tp=2))
    nf.convert(plain.save(tmp_path / "plain"), tmp_path / "expected", topology=Topology(tp=2))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    first, second = report.plan.warnings
    assert "dequantised from fp8 (a scale for a tensor or a row)" in first
    assert second.startswith("7 scales of activations, beside quantised weights, are left out:")


def test_a_quantised_embedding_that_is_tied_and_padded(tmp_path: Path) -> None:
    """Rows that are added to a vocabulary are zeros, and its matrix may be quantised as well."""
    model = make("llama", **{**WHOLE, "tie_word_embeddings": True})
    coded, plain = quantised(model)
    name = EMBEDDING
    codes = weights_of(model.tensors[name]).float().to(torch.float8_e4m3fn)
    del coded.tensors[name]  # the zoo takes the dtype of the first tensor for the model's
    coded.tensors[name] = tensor_of(codes)
    coded.tensors[f"{name}_scale_inv"] = tensor_of(torch.full((2, 2), 0.25))
    plain.tensors[name] = tensor_of((codes.float() * 0.25).bfloat16())
    options: dict[str, Any] = {"topology": Topology(tp=2), "pad_vocab_to_multiple_of": 128}
    nf.convert(coded.save(tmp_path / "coded"), tmp_path / "out", **options)
    nf.convert(plain.save(tmp_path / "plain"), tmp_path / "expected", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert nf.verify(tmp_path / "coded", tmp_path / "out").equal


def test_inspect_says_so_in_a_line(tmp_path: Path) -> None:
    coded, _ = saved(tmp_path)
    found = nf.inspect(coded)
    assert found.quantization == found.to_json()["quantization"] == "fp8 (128x128 blocks)"
    assert (found.problem, found.warnings) == (None, ())
    [line] = [each for each in inspection_lines(found) if "quantised" in each]
    assert line == "  quantised   fp8 (128x128 blocks); convert writes it dequantised"


def test_inspect_says_what_is_not_read_or_not_quantised(tmp_path: Path) -> None:
    model, plain = quantised(make("llama", **WHOLE))
    refused = Model(model.family, {**model.config, **_scheme(fmt="e5m2")}, model.tensors)
    found = nf.inspect(refused.save(tmp_path / "refused"))
    assert found.quantization is None
    assert "which is not read: fp8 in e4m3 and mxfp4 are dequantised" in (found.problem or "")
    idle = Model(plain.family, {**plain.config, **_scheme()}, plain.tensors)
    found = nf.inspect(idle.save(tmp_path / "idle"))
    assert found.quantization is None
    assert "so nothing is quantised" in found.warnings[0]
    found = nf.inspect(plain.save(tmp_path / "plain"))
    assert (found.quantization, found.warnings) == (None, ())
    assert not any("quantised" in line for line in inspection_lines(found))


def _scheme(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": {**CONFIG, **changes}}


@pytest.mark.parametrize("size", [256, 2**31, 2**70])
def test_a_block_as_large_as_it_is_stated_is_no_larger_than_its_matrix(
    size: int, tmp_path: Path
) -> None:
    coded, plain = one_scale((1, 1), "weight_scale_inv", torch.float32)
    coded.config.update(_scheme(weight_block_size=[size, size]))
    for name, tensor in coded.tensors.items():
        if name.endswith("_scale_inv"):
            rows, columns = coded.tensors[name.removesuffix("_scale_inv")].shape
            grid = (-(-rows // size), -(-columns // size))
            scale = weights_of(tensor).reshape(1, 1).expand(grid)
            coded.tensors[name] = tensor_of(scale.contiguous())
    nf.convert(coded.save(tmp_path / "coded"), tmp_path / "out", topology=Topology(tp=2))
    nf.convert(plain.save(tmp_path / "plain"), tmp_path / "expected", topology=Topology(tp=2))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_spoils_its_own_block(scale: float, tmp_path: Path) -> None:
    """As in transformers: what a file says is written, and no block beside it."""
    coded, _ = quantised(make("llama", **WHOLE))
    scales = weights_of(coded.tensors[f"{Q_PROJ}_scale_inv"]).clone()
    scales[0, 1] = scale
    coded.tensors[f"{Q_PROJ}_scale_inv"] = tensor_of(scales)
    nf.convert(coded.save(tmp_path / "coded"), tmp_path / "there", topology=Topology(tp=2))
    nf.convert(tmp_path / "there", tmp_path / "back")
    found = weights_of(read_tensors(tmp_path / "back")[Q_PROJ])
    codes = _torch(coded.tensors[Q_PROJ])
    wanted = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert not found[:128, 128:].isfinite().any()
    assert found[:128, :128].isfinite().all()
    assert found[128:].isfinite().all()


def _changed(model: Model, changes: dict[str, Tensor | None]) -> Model:
    tensors = {**model.tensors, **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return Model(model.family, model.config, kept)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {f"{Q_PROJ}_scale_inv": None},
            CheckpointError,
            "q_proj.weight is F8_E4M3, and its scales are missing: .*q_proj.weight_scale_inv or",
        ),
        (
            {f"{Q_PROJ}_scale_inv": tensor_of(torch.ones(2, 3))},
            CheckpointError,
            r"scale_inv has shape \[2, 3\]; .* of \[256, 256\] has \[2, 2\] blocks of 128x128, 256",
        ),
        (
            {f"{Q_PROJ}_scale_inv": Tensor("I8", (2, 2), bytes(4))},
            UnsupportedModelError,
            r"the weights are quantised \(fp8, F8_E4M3, I8\), which is not read",
        ),
        (
            {f"{Q_PROJ}_scale_inv": Tensor("F64", (2, 2), bytes(32))},
            UnsupportedModelError,
            "scale_inv is F64, and scales are F32, BF16, F16, F8_E8M0, U8",
        ),
        (
            {Q_PROJ: Tensor("U8", (256, 256), bytes(256 * 256))},
            UnsupportedModelError,
            "q_proj.weight is U8: quantised or integer weights",
        ),
        (
            {"model.norm.weight": Tensor("F8_E4M3", (256,), bytes(256))},
            CheckpointError,
            "model.norm.weight is F8_E4M3, and its scales are missing",
        ),
        (
            {"other.weight_scale_inv": tensor_of(torch.ones(1))},
            CheckpointError,
            "1 tensors have no place in Nanotron's llama: other.weight_scale_inv",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Tensor | None], error: Any, message: str, tmp_path: Path
) -> None:
    coded, _ = quantised(make("llama", **WHOLE))
    source = _changed(coded, changes).save(tmp_path / "source")
    refused(source, tmp_path, error, message)


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": None}, "quantization_config"),
        ({"fmt": "e5m2"}, "fp8"),
        ({"weight_block_size": [128]}, "fp8"),
        ({"weight_block_size": [128, 0]}, "fp8"),
        ({"weight_block_size": [True, 128]}, "fp8"),
    ],
)
def test_other_schemes_are_refused(changes: Any, method: str, tmp_path: Path) -> None:
    coded, _ = quantised(make("llama", **WHOLE), config={**CONFIG, **changes})
    message = rf"the weights are quantised \({method}, F8_E4M3\), which is not read"
    refused(coded.save(tmp_path / "source"), tmp_path, UnsupportedModelError, message)
