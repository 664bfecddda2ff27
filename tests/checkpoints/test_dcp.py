"""torch.distributed.checkpoint in and out, against torch's own dcp.save and dcp.load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests import forks
from tests.checkpoints.test_processes import ranks
from tests.modelzoo import Model, make, read_tensors

torch = pytest.importorskip("torch")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 46,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 38,
}


def llama(**changes: Any) -> Model:
    return make("llama", **{**SMALL, **changes})


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return llama().save(tmp_path / "hf")


def tensors_of(root: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(root / "model.safetensors"))


def save(root: Path, state: dict[str, Any], **choices: Any) -> Path:
    """Saved by torch, by one process."""
    import torch.distributed.checkpoint as dcp

    dcp.save(state, storage_writer=dcp.FileSystemWriter(root, **choices), no_dist=True)
    return root


def load(root: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Loaded by torch, by one process."""
    import torch.distributed.checkpoint as dcp

    state = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    dcp.load(state, checkpoint_id=root, no_dist=True)
    return state


def titan_of(root: Path) -> dict[str, Any]:
    from tests.checkpoints.dcp_ranks import in_torchtitan

    return in_torchtitan(tensors_of(root), 4, 2)


def same(one: Path, other: Path) -> None:
    assert read_tensors(one) == read_tensors(other)


def test_ranks_of_torch_there_and_back(tmp_path: Path) -> None:
    """FSDP2 and DTensors of two ranks, read and written; one rank has more rows than the other."""
    hf = llama(vocab_size=37).save(tmp_path / "hf")
    nf.convert(hf, tmp_path / "ours", to="dcp", max_shard_size=20_000)
    nf.convert(hf, tmp_path / "ours-torchtitan", to="dcp", names="torchtitan")
    results = forks.run(("-m", "tests.checkpoints.dcp_ranks", tmp_path), ranks(2), tmp_path, 120)
    assert [result.code for result in results] == [0, 0], results[0].err + results[1].err
    for name in ("fsdp", "tp"):
        source = tmp_path / name
        assert len(list(source.glob("*.distcp"))) == 2
        there = tmp_path / f"{name}-nanotron"
        report = nf.convert(
            source, there, like=hf, topology=Topology(tp=2, pp=2), pad_vocab_to_multiple_of=2
        )
        assert nf.verify(hf, there).equal
        assert nf.verify(source, there, like=hf).equal
        nf.convert(source, tmp_path / f"{name}-hf", to="hf", like=hf)
        same(hf, tmp_path / f"{name}-hf")
        if name == "fsdp":
            assert (
                "entries beside the model's weights are left out: optimizer ("
                in (report.plan.warnings[0])
            )


@pytest.mark.parametrize("names", ["hf", "torchtitan", "torchtitan-0.2"])
def test_there_and_back(names: str, hf: Path, tmp_path: Path) -> None:
    """Hugging Face -> DCP -> Nanotron -> DCP -> Hugging Face: the same bytes, with torch's word."""
    first, second = tmp_path / "first", tmp_path / "second"
    nf.convert(hf, first, to="dcp", names=names)
    nf.convert(first, tmp_path / "nanotron", topology=Topology(tp=2))
    nf.convert(tmp_path / "nanotron", second, to="dcp", names=names, max_shard_size=9000)
    assert len(list(first.glob("*.distcp"))) == 1
    assert len(list(second.glob("*.distcp"))) > 3
    expected = tensors_of(hf) if names == "hf" else titan_of(hf)
    if names == "torchtitan-0.2":
        expected = {
            name.replace("qkv_linear.", "").replace("lm_head", "output"): tensor
            for name, tensor in expected.items()
        }
    for root in (first, second):
        found = load(root, expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert nf.verify(hf, root).equal
    nf.convert(second, tmp_path / "back", to="hf")
    same(hf, tmp_path / "back")


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "starcoder2", "smollm3"])
def test_every_family_with_names_of_hugging_face(family: str, tmp_path: Path) -> None:
    hf = make(family).save(tmp_path / "hf")
    nf.convert(hf, tmp_path / "dcp", to="dcp")
    nf.convert(tmp_path / "dcp", tmp_path / "nanotron", topology=Topology(tp=2))
    assert nf.verify(tmp_path / "nanotron", tmp_path / "dcp").equal
    nf.convert(tmp_path / "dcp", tmp_path / "back", to="hf")
    same(hf, tmp_path / "back")
    with pytest.raises(
        UnsupportedModelError, match=f"those of a llama, and the model is a {family}"
    ):
        nf.convert(hf, tmp_path / "titan", to="dcp", names="torchtitan")


def test_a_tied_model_has_its_head_under_both_names(tmp_path: Path) -> None:
    hf = llama(tie_word_embeddings=True).save(tmp_path / "hf")
    nf.convert(hf, tmp_path / "dcp", to="dcp")
    nf.convert(hf, tmp_path / "nanotron")
    nf.convert(tmp_path / "nanotron", tmp_path / "titan", to="dcp", names="torchtitan")
    matrix = tensors_of(hf)["model.embed_tokens.weight"]
    for root, names in (
        (tmp_path / "dcp", ("model.embed_tokens.weight", "lm_head.weight")),
        (tmp_path / "titan", ("tok_embeddings.weight", "lm_head.weight")),
    ):
        found = load(root, dict.fromkeys(names, matrix))
        assert all(torch.equal(found[name], matrix) for name in names)
        assert nf.verify(hf, root).equal
    # A copy in another layout than the matrix: compared chunk by chunk.
    other = {**tensors_of(hf), "lm_head.weight": matrix.clone()}
    save(tmp_path / "equal", other)
    nf.convert(tmp_path / "equal", tmp_path / "from-equal", like=hf)
    other["lm_head.weight"][37, 31] += 1
    save(tmp_path / "unequal", other)
    with pytest.raises(
        CheckpointError,
        match=r"lm_head\.weight differs from model\.embed_tokens\.weight in 1 of 1216 elements",
    ):
        nf.convert(tmp_path / "unequal", tmp_path / "from-unequal", like=hf)


def test_names_that_wrappers_and_trainers_put_around(hf: Path, tmp_path: Path) -> None:
    wrapped = {
        name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): tensor
        for name, tensor in tensors_of(hf).items()
    }
    state = {"app": {"model": wrapped, "optim": {"step": 1, "lr": torch.ones(())}}}
    source = save(tmp_path / "source", state)
    report = nf.convert(source, tmp_path / "nanotron", like=hf)
    assert nf.verify(hf, tmp_path / "nanotron").equal
    assert report.plan.warnings[0].endswith("weights are left out: app (2)")


def test_state_beside_torchtitans_weights(hf: Path, tmp_path: Path) -> None:
    state = {
        **titan_of(hf),
        "freqs_cis": torch.ones(4, 8),
        "optimizer": {"state.tok_embeddings.weight.exp_avg": torch.ones(38, 32)},
        "lr_scheduler": {"last_epoch": 7},
        "train_state": {"step": 7},
    }
    source = save(tmp_path / "source", state)
    report = nf.convert(source, tmp_path / "back", to="hf", like=hf)
    same(hf, tmp_path / "back")
    assert (
        "3 entries beside the model's weights are left out: optimizer (1), lr_sch"
        in (report.plan.warnings[0])
    )
    found = nf.inspect(source, like=hf)
    assert (found.format, found.family, found.rope_interleaved) == ("dcp", "llama", True)
    assert (found.num_tensors, found.tensor_files) == (21, 1)


def test_a_tensor_without_a_place(hf: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "source", {**titan_of(hf), "v_head.weight": torch.ones(1, 32)})
    with pytest.raises(CheckpointError, match=r"1 tensors have no place.*: v_head\.weight"):
        nf.convert(source, tmp_path / "out", like=hf)
    nf.convert(source, tmp_path / "out", like=hf, ignore_tensors=["v_head.*"])
    assert nf.verify(hf, tmp_path / "out").equal


def test_a_cast_and_the_configuration(hf: Path, tmp_path: Path) -> None:
    wide = {name: tensor.float() for name, tensor in titan_of(hf).items()}
    source = save(tmp_path / "source", wide, thread_count=2)
    nf.convert(source, tmp_path / "kept", to="hf", like=hf)
    nf.convert(source, tmp_path / "cast", to="hf", like=hf, dtype="bf16")
    same(hf, tmp_path / "cast")
    kept = tensors_of(tmp_path / "kept")
    assert all(torch.equal(kept[name], each.float()) for name, each in tensors_of(hf).items())
    for name, dtype in (("kept", "float32"), ("cast", "bfloat16")):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["torch_dtype"] == dtype


def test_a_tensor_that_was_saved_transposed(hf: Path, tmp_path: Path) -> None:
    state = {
        name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor
        for name, tensor in tensors_of(hf).items()
    }
    assert not state["lm_head.weight"].is_contiguous()
    source = save(tmp_path / "source", state)
    nf.convert(source, tmp_path / "nanotron", like=hf, topology=Topology(tp=2))
    assert nf.verify(hf, tmp_path / "nanotron").equal


def test_files_in_the_safetensors_format(hf: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    source = save(
        tmp_path / "source",
        tensors_of(hf),
        serialization_format=SerializationFormat.SAFETENSORS,
    )
    nf.convert(source, tmp_path / "back", to="hf", like=hf)
    same(hf, tmp_path / "back")


def test_where_the_configuration_comes_from(hf: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "source", tensors_of(hf))
    with pytest.raises(CheckpointError, match=r"source: no config.json lies in it.*--like DIR"):
        nf.convert(source, tmp_path / "out")
    found = nf.inspect(source)
    assert found.spec is None
    assert found.problem is not None
    assert "no config.json lies in it" in found.problem
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match=r"--like .*empty: it has no config\.json and no nano"
    ):
        nf.convert(source, tmp_path / "out", like=tmp_path / "empty")
    # Of two sides, the other one's.
    assert nf.verify(source, hf).equal
    assert nf.verify(hf, source).equal
    nf.convert(hf, tmp_path / "nanotron")
    assert nf.verify(tmp_path / "nanotron", source).equal
    with pytest.raises(ConfigError, match=r"--logits: .*source is of torch.distributed.* --to hf"):
        nf.verify(source, hf, logits=True)
    with pytest.raises(ConfigError, match="--like: it has no meaning where no side is"):
        nf.verify(hf, hf, like=hf)
    with pytest.raises(ConfigError, match="--like: it has no meaning for a Hugging Face"):
        nf.convert(hf, tmp_path / "out", like=hf, to="dcp")
    # A folder of ours has its own.
    nf.convert(tmp_path / "nanotron", tmp_path / "ours", to="dcp")
    assert nf.inspect(tmp_path / "ours").spec == nf.inspect(hf).spec
    shutil.copy(hf / "config.json", source)
    nf.convert(source, tmp_path / "out")


def test_a_configuration_of_another_shape(hf: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "source", titan_of(hf))
    larger = llama(intermediate_size=48).save(tmp_path / "larger")
    message = r"mlp.gate_proj.weight has shape \[46, 32\], config.json calls for \[48, 32\]"
    with pytest.raises(CheckpointError, match=message):
        nf.convert(source, tmp_path / "out", like=larger)
    other = make("qwen2").save(tmp_path / "other")
    message = "have the names of torchtitan's llama, and the configuration is that of a qwen2"
    with pytest.raises(UnsupportedModelError, match=message):
        nf.convert(source, tmp_path / "out", like=other)


def test_a_model_of_other_names(tmp_path: Path) -> None:
    source = save(tmp_path / "source", {"encoder.weight": torch.ones(2, 2)})
    message = "no tensor is called model.embed_tokens.weight or tok_embeddings.weight.*as encoder"
    with pytest.raises(CheckpointError, match=message):
        nf.inspect(source)


def test_two_models(hf: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "source", {"a": tensors_of(hf), "b": tensors_of(hf)})
    with pytest.raises(
        CheckpointError, match=r"it holds 2 models, whose names begin with 'a\.', 'b\."
    ):
        nf.inspect(source)


def test_folders_near_one(hf: Path, tmp_path: Path) -> None:
    save(tmp_path / "run" / "step-2", tensors_of(hf))
    save(tmp_path / "run" / "step-10", tensors_of(hf))
    with pytest.raises(
        CheckpointError, match=r"name one, such as .*step-10, and .*--like DIR_OR_ID"
    ):
        nf.inspect(tmp_path / "run")
    (tmp_path / "run" / "step-2" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"without its \.metadata"):
        nf.inspect(tmp_path / "run" / "step-2")


def test_replacing_one(hf: Path, tmp_path: Path) -> None:
    """A folder of DCP is a checkpoint, and may be replaced as one."""
    nf.convert(hf, tmp_path / "out", to="dcp", max_shard_size=9000)
    nf.convert(hf, tmp_path / "out", to="dcp", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "config.json",
    ]
