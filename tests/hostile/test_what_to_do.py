"""Folders that are no checkpoint, and names that no class expects: the error says what to do."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanotron_fast
from nanotron_fast.cli.reporting import report_lines, verification_lines
from nanotron_fast.errors import CheckpointError, UnsupportedModelError
from tests.modelzoo import Model, Tensor, make, random_tensor, read_tensors, write_json
from tests.refusals import refused


def model(**changes: Any) -> Model:
    return make("llama", num_hidden_layers=1, **changes)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"{}")
    return root


def cache_folder(tmp_path: Path) -> Path:
    root = tmp_path / "models--org--name"
    model().save(root / "snapshots" / "aaa")
    model().save(root / "snapshots" / "bbb")
    touch(root, "refs/main")
    (root / "refs" / "main").write_text("aaa")
    return root


def adapter(tmp_path: Path) -> Path:
    root = touch(tmp_path / "lora", "adapter_model.safetensors")
    write_json(root / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    return root


def adapter_beside_config(tmp_path: Path) -> Path:
    return touch(adapter(tmp_path), "config.json")


def deepspeed(tmp_path: Path) -> Path:
    return touch(tmp_path / "ds", "latest", "zero_to_fp32.py", "global_step10/x.pt", "config.json")


def deepspeed_step(tmp_path: Path) -> Path:
    touch(tmp_path / "ds", "global_step10/mp_rank_00_model_states.pt")
    return tmp_path / "ds" / "global_step10"


def fsdp(tmp_path: Path) -> Path:
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        touch(tmp_path / "fsdp", f"{name}/__0_0.distcp", f"{name}/.metadata", "config.json")
    return tmp_path / "fsdp"


def fsdp_without_metadata(tmp_path: Path) -> Path:
    return touch(tmp_path / "fsdp", "__0_0.distcp", "config.json")


def steps(tmp_path: Path) -> Path:
    for step in ("9", "10"):
        touch(tmp_path / "run", f"{step}/model_config.json", f"{step}/model/model/x")
    return tmp_path / "run"


def inside_a_step(tmp_path: Path) -> Path:
    return steps(tmp_path) / "10" / "model"


def deep_inside_a_step(tmp_path: Path) -> Path:
    return steps(tmp_path) / "10" / "model" / "model"


def trainer(tmp_path: Path) -> Path:
    names = [f"checkpoint-{step}/config.json" for step in (100, 20, 3000, 500)]
    return touch(tmp_path / "trainer", *names, "runs/events")


def trainer_with_a_config(tmp_path: Path) -> Path:
    return touch(trainer(tmp_path), "config.json")


def meta(tmp_path: Path) -> Path:
    return touch(tmp_path / "meta", "params.json", "consolidated.00.pth", "tokenizer.model")


def mistral(tmp_path: Path) -> Path:
    return touch(tmp_path / "mistral", "params.json", "consolidated.safetensors")


def gguf(tmp_path: Path) -> Path:
    return touch(tmp_path / "gguf", "model-q4.gguf")


def flax(tmp_path: Path) -> Path:
    return touch(tmp_path / "flax", "config.json", "flax_model.msgpack")


def diffusers(tmp_path: Path) -> Path:
    return touch(tmp_path / "diffusers", "model_index.json")


FOLDERS: dict[Callable[[Path], Path], str] = {
    cache_folder: r"Hub's cache: name .*/snapshots/aaa, or the model's id org/name",
    adapter: r"an adapter \(LoRA\) of org/base.*merge_and_unload",
    adapter_beside_config: r"an adapter \(LoRA\) of org/base.*merge_and_unload",
    deepspeed: r"DeepSpeed's.*python .*/ds/zero_to_fp32.py .*/ds NEW --safe_serialization",
    deepspeed_step: r"python .*/ds/zero_to_fp32.py .*/ds NEW",
    fsdp: r"name one, such as .*/pytorch_model_fsdp_0, and .* with --like .*/fsdp$",
    fsdp_without_metadata: r"a sharded checkpoint of torch's, without its \.metadata",
    steps: r"2 training steps, without latest.txt .* such as .*/run/10$",
    inside_a_step: r"a part of the Nanotron checkpoint .*/run/10: name that",
    deep_inside_a_step: r"a part of the Nanotron checkpoint .*/run/10: name that",
    trainer: r"checkpoint-100, checkpoint-500, checkpoint-3000 and 1 more.*checkpoint-3000$",
    trainer_with_a_config: r"name one, such as .*checkpoint-3000$",
    meta: r"consolidated.00.pth, a file in Meta's own layout: .*convert_llama_weights_to_hf",
    mistral: r"consolidated.safetensors, a file in Mistral's own layout",
    gguf: r"the weights are in model-q4.gguf, a GGUF file",
    flax: r"flax_model.msgpack, a file of Flax's",
    diffusers: r"a pipeline of diffusers'",
}


@pytest.mark.parametrize("make_folder", FOLDERS, ids=lambda make_folder: make_folder.__name__)
def test_folders(make_folder: Callable[[Path], Path], tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    refused(root, tmp_path, CheckpointError, f"^{root}: .*{FOLDERS[make_folder]}")


@pytest.mark.parametrize("document", [b"[", b"[]", b'{"base_model_name_or_path": 7}', b"\xff"])
def test_an_adapter_without_sense(document: bytes, tmp_path: Path) -> None:
    root = adapter(tmp_path)
    (root / "adapter_config.json").write_bytes(document)
    refused(root, tmp_path, CheckpointError, r"an adapter \(LoRA\), without the model's own")


def renamed(prefix: str, remove: str = "", **changes: Any) -> Model:
    changed = model(**changes)
    tensors = changed.tensors.items()
    changed.tensors = {prefix + name.removeprefix(remove): tensor for name, tensor in tensors}
    return changed


@pytest.mark.parametrize(
    ("prefix", "remove", "message"),
    [
        ("_orig_mod.", "", "names begin with '_orig_mod.'.*torch.compile .*model._orig_mod"),
        ("module.", "", "names begin with 'module.'.*DistributedDataParallel"),
        ("module.module.", "", "names begin with 'module.module.'.*DistributedDataParallel"),
        ("base_model.model.", "", "peft puts it there: save model.merge_and_unload"),
        ("pretrained_model.", "", "TRL's .*save model.pretrained_model"),
        ("model.language_model.", "model.", "a multimodal model puts it there"),
        ("language_model.", "", "a multimodal model puts it there"),
        ("theirs.", "", "names begin with 'theirs.'.*take it off every name"),
        ("model.", "", "names begin with 'model.'.*take it off every name"),
        ("", "model.", "embed_tokens.weight is there, without 'model.'.*saved without its head"),
    ],
)
def test_names_under_a_prefix(prefix: str, remove: str, message: str, tmp_path: Path) -> None:
    source = renamed(prefix, remove).save(tmp_path / "source")
    message = f"embed_tokens.weight is missing, and config.json calls for it; .*{message}"
    refused(source, tmp_path, CheckpointError, message)


def test_layers_of_an_adapter(tmp_path: Path) -> None:
    changed = model()
    name = "model.layers.0.self_attn.q_proj."
    changed.tensors[f"{name}base_layer.weight"] = changed.tensors.pop(f"{name}weight")
    source = changed.save(tmp_path / "source")
    refused(source, tmp_path, CheckpointError, r"q_proj.weight is missing.*\(LoRA\) are not merged")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_one_missing_tensor_is_no_prefix(name: str, tmp_path: Path) -> None:
    changed = model()
    changed.tensors[f"model.odd.{name.removeprefix('model.')}"] = changed.tensors.pop(name)
    source = changed.save(tmp_path / "source")
    refused(source, tmp_path, CheckpointError, f"{name} is missing, and config.json calls for it$")


def test_a_head_trained_apart_from_what_it_is_tied_to(tmp_path: Path) -> None:
    changed = model(tie_word_embeddings=True)
    extra = {"lm_head.weight": random_tensor(np.random.default_rng(9), "BF16", (160, 64))}
    source = changed.save(tmp_path / "source", extra=extra)
    message = "differs from .* set tie_word_embeddings to false in config.json; if not, leave it"
    refused(source, tmp_path, CheckpointError, message)
    nanotron_fast.convert(source, tmp_path / "there", ignore_tensors=["lm_head.weight"])
    nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == changed.tensors


@pytest.mark.parametrize("key", ["text_config", "llm_config", "thinker_config"])
def test_a_multimodal_wrapper(key: str, tmp_path: Path) -> None:
    inner = model().config
    source = model().save(tmp_path / "source")
    wrapper = {"model_type": "llava", key: {"model_type": "llama", **inner}}
    write_json(source / "config.json", wrapper)
    message = f"model_type 'llava' wraps a language model .{key}: 'llama'.*multimodal"
    refused(source, tmp_path, UnsupportedModelError, message)


QUANTIZATION = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def test_a_quantization_config_left_behind(tmp_path: Path) -> None:
    changed = model(quantization_config=QUANTIZATION)
    source = changed.save(tmp_path / "source")
    report = nanotron_fast.convert(source, tmp_path / "there")
    (warning,) = report.plan.warnings
    assert "quantization_config (bitsandbytes) is left out: every tensor is in floating" in warning
    nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == changed.tensors
    assert "quantization_config" not in (tmp_path / "back" / "config.json").read_text()


def test_quantised_weights_are_refused_as_ever(tmp_path: Path) -> None:
    changed = model(quantization_config=QUANTIZATION)
    name = "model.layers.0.self_attn.q_proj.weight"
    changed.tensors[name] = Tensor("U8", (2048, 1), bytes(2048))
    source = changed.save(tmp_path / "source")
    refused(
        source, tmp_path, UnsupportedModelError, r"the weights are quantised \(bitsandbytes, U8\)"
    )


def with_more(tmp_path: Path) -> tuple[Path, list[str]]:
    """A model with a value head, and a layer that predicts further tokens."""
    rng = np.random.default_rng(3)
    names = ["v_head.summary.bias", "v_head.summary.weight", "model.layers.1.eh_proj.weight"]
    extra = {name: random_tensor(rng, "BF16", (4,)) for name in names}
    return model().save(tmp_path / "more", extra=extra), names


def test_tensors_that_the_user_leaves_out(tmp_path: Path) -> None:
    source, names = with_more(tmp_path)
    refused(source, tmp_path, CheckpointError, "3 tensors have no place.* 1 layer, and the")
    globs = ["v_head.*", "model.layers.1.*"]
    report = nanotron_fast.convert(source, tmp_path / "there", ignore_tensors=globs)
    assert sorted(report.plan.ignored) == sorted(names)
    assert sorted(report.to_json(1)["ignored_tensors"]) == sorted(names)
    (line,) = [line for line in report_lines(report) if line.startswith("ignored 3 tensors: ")]
    assert all(name in line for name in names)
    assert not nanotron_fast.verify(source, tmp_path / "there").equal
    found = nanotron_fast.verify(source, tmp_path / "there", ignore_tensors=globs)
    assert found.equal
    assert sorted(found.to_json()["ignored_tensors"]) == sorted(names)
    assert "ignored 3 tensors" in next(iter(verification_lines(found)))


def test_a_layer_of_a_number_that_is_none(tmp_path: Path) -> None:
    extra = {f"model.layers.{'9' * 5000}.weight": Tensor("F32", (1,), bytes(4))}
    source = make("llama", num_hidden_layers=1).save(tmp_path / "source", extra=extra)
    refused(source, tmp_path, CheckpointError, "1 tensors have no place.*--ignore-tensors GLOB")


def test_one_pattern_by_itself(tmp_path: Path) -> None:
    source, names = with_more(tmp_path)
    plan = nanotron_fast.plan(source, tmp_path / "out", ignore_tensors=["*.1.*", "*.summary.*"])
    assert sorted(plan.ignored) == sorted(names)
    with pytest.raises(CheckpointError, match="1 tensors have no place"):
        nanotron_fast.plan(source, tmp_path / "out", ignore_tensors="v_head.*")


def test_a_tensor_that_the_model_needs_is_not_left_out(tmp_path: Path) -> None:
    source = model().save(tmp_path / "source")
    message = "model.norm.weight is missing.*--ignore-tensors leaves it out, and it cannot be done"
    refused(source, tmp_path, CheckpointError, message, ignore_tensors=["*.norm.*"])


def test_parameters_of_a_nanotron_checkpoint(tmp_path: Path) -> None:
    nanotron_fast.convert(model().save(tmp_path / "hf"), tmp_path / "there")
    folder = tmp_path / "there" / "model" / "model"
    norm = folder / "final_layer_norm" / "pp_block"
    shutil.copytree(norm, folder / "value_head" / "pp_block")
    refused(tmp_path / "there", tmp_path, CheckpointError, "1 parameters have no place.*GLOB")
    globs = ["model.value_head.*"]
    report = nanotron_fast.convert(tmp_path / "there", tmp_path / "back", ignore_tensors=globs)
    assert report.plan.ignored == ("model.value_head.pp_block.weight",)
    message = "final_layer_norm.pp_block.weight is missing.*--ignore-tensors leaves it out"
    globs = ["*.final_layer_norm.*", *globs]
    with pytest.raises(CheckpointError, match=message):
        nanotron_fast.plan(tmp_path / "there", tmp_path / "out", ignore_tensors=globs)
