"""Logits, losses and gradients of every family beside transformers', in fp32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanotron_fast.models import build
from tests.families import zoo
from tests.models.tiny import assert_near, gradients_as, save, tokens

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
}
BIASES = {"attention_bias": True, "mlp_bias": True, "head_dim": 10}
EVERY_OTHER = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases and head_dim": ("llama", BIASES),
    "llama, relu2": ("llama", {"hidden_act": "relu2"}),
    "llama, linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama, dynamic": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24},
    ),
    "llama, yarn": ("llama", {"rope_scaling": YARN, "max_position_embeddings": 64}),
    "llama, llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama, longrope": ("llama", {"rope_scaling": LONGROPE, "max_position_embeddings": 32}),
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, some windows": ("qwen2", EVERY_OTHER),
    "smollm3": ("smollm3", {}),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2, window": ("starcoder2", {"sliding_window": 7}),
    "starcoder2, untied and without biases": (
        "starcoder2",
        {"use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu"},
    ),
}
WITH_GRADIENTS = {"llama, tied", "llama, biases and head_dim", "qwen2", "qwen2_moe", "starcoder2"}


def theirs(root: Path) -> Any:
    from transformers import AutoModelForCausalLM

    # Version 4's default leaves out caps of scores, and it keeps an activation's numbers in bf16.
    return AutoModelForCausalLM.from_pretrained(
        root, dtype=torch.float32, attn_implementation="eager"
    ).float()


def is_version_4() -> bool:
    import transformers

    return bool(transformers.__version__.startswith("4."))


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("name", CASES)
def test_a_family_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    family, changes = CASES[name]
    if name == "llama, longrope" and is_version_4():
        pytest.skip("transformers 4 takes the first context from max_position_embeddings alone")
    check(save(tmp_path / "hf", family, **changes), has_gradients=name in WITH_GRADIENTS)


def check(root: Path, *, has_gradients: bool) -> None:
    """Logits, loss and gradients."""
    decoder, model = build(root), theirs(root)
    ids, labels = tokens(2, 40)
    ours, expected = decoder(ids), model(ids).logits
    assert float((ours - expected).detach().abs().max()) <= 2e-5
    assert float(expected.detach().abs().max()) > 0.5
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
    loss, expected_loss = decoder(ids, labels=labels), mean_loss(expected, labels)
    assert_near(loss, expected_loss, "loss", 1e-6)
    if has_gradients:
        loss.backward()
        expected_loss.backward()
        # Version 4 has no gradients of experts that no token went to.
        grads = {
            key: torch.zeros_like(each) if each.grad is None else each.grad
            for key, each in model.named_parameters()
        }
        grads |= {
            key: torch.zeros_like(each)
            for key, each in model.named_buffers()
            if key.endswith(("e_score_correction_bias", "act_fn.beta", "act_fn.eps"))
        }
        wanted = gradients_as(decoder, root, grads)
        numbers: list[str] = []
        for key, parameter in decoder.named_parameters():
            if parameter.requires_grad and parameter.numel() == 1:
                numbers.append(key)
            elif parameter.requires_grad:
                assert_near(parameter.grad, wanted[key], key)
        if numbers:
            # Each is a sum over tokens and rows, of which nearly nothing may be left in some layer:
            # relative to the largest of all layers.
            found = [decoder.get_parameter(key).grad for key in numbers]
            together = torch.cat([wanted[key] for key in numbers])
            assert_near(torch.cat(found), together, "gradients of numbers")


@pytest.mark.parametrize(
    "family", ["llama_tied", "llama_untied", "qwen2", "qwen2_moe", "starcoder2"]
)
def test_the_goldens_logits(family: str, golden: Path) -> None:
    reference = json.loads((golden / family / "reference_logits.json").read_text())
    decoder = build(golden / family / "hf")
    expected = torch.tensor(reference["logits_fp32_compute_last4"])
    ours = decoder(torch.tensor(reference["input_ids"]))[:, -4:].detach()
    assert float((ours - expected).abs().max()) <= 2e-5
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", zoo.cases())
def test_a_family_of_the_zoo_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    check(zoo.save(name, tmp_path / "hf"), has_gradients=True)
