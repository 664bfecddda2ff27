"""Whole steps of training in bf16 on compiled kernels, at sizes that divide by nothing.

Triton's interpreter does not multiply bf16: these run on the emulator of a GPU alone, as
`python -m tests.kernels.emulator tests/kernels/test_compiled_steps.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from nanotron_fast.model.spec import Attention, Dense, Layer, ModelSpec
from nanotron_fast.models.architecture import Architecture
from tests.train import engine
from tests.train.engine import Case, Run

pytestmark = pytest.mark.skipif("EMULATOR_ARCH" not in os.environ, reason="needs the emulator")

HIDDEN, INTERMEDIATE, VOCAB, LENGTH = 96, 205, 163, 37
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=24, rotary=(0, 24))
QWEN2 = ModelSpec(
    hidden_size=HIDDEN,
    layers=(Layer(replace(ATTENTION, has_qkv_bias=True), Dense(INTERMEDIATE)),) * 2,
    intermediate_size=INTERMEDIATE,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    hidden_act="silu",
    norm_eps=1e-5,
    initializer_range=0.02,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
CAPPED = replace(ATTENTION, softcap=50.0, scale=0.2)
GEMMA2 = replace(
    QWEN2,
    layers=tuple(
        Layer(replace(CAPPED, window=window), Dense(INTERMEDIATE), norms="around")
        for window in (7, None)
    ),
    hidden_act="gelu_pytorch_tanh",
    norm_adds_one=True,
    embedding_scale=HIDDEN**0.5,
    logit_softcap=30.0,
    tie_word_embeddings=True,
)


@dataclass(frozen=True, kw_only=True)
class OddCase(Case):
    """With a model of its own."""

    spec: ModelSpec
    family: str


class OddRun(Run):
    case: OddCase

    def model(self) -> Architecture:
        return Architecture.of_spec(
            self.case.spec, family=self.case.family, model_class="nanotron-fast"
        )


def trained(case: OddCase, num_steps: int) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Losses and norms, and of each parameter the mean of its gradients."""
    run = OddRun(case)
    found = run.steps(0, num_steps)
    for state in run.optimizer.states:
        tensor = state.trained.tensor.detach().flatten()
        assert torch.equal(tensor, state.master.to(case.dtype)), state.trained.name
    return found, {each.trained.name: each.moments["exp_avg"] for each in run.optimizer.states}


@pytest.mark.parametrize(
    ("fused", "recompute", "spec", "family"),
    [
        ("never", "none", QWEN2, "qwen2"),
        ("always", "products", QWEN2, "qwen2"),
        ("never", "layer", GEMMA2, "gemma2"),
    ],
    ids=["single kernels", "fused kernels", "softcaps and windows"],
)
def test_bf16_is_as_near_as_that_of_plain_torch(
    fused: str, recompute: str, spec: ModelSpec, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps beside fp32's: two micro-batches of documents, clipping, AdamW on masters."""
    for name, value in {"LENGTH": LENGTH, "VOCAB": VOCAB, "MICRO_BATCHES": 1}.items():
        monkeypatch.setattr(engine, name, value)
    whole = engine.whole_values
    if spec.norm_adds_one:
        monkeypatch.setattr(engine, "whole_values", lambda *of: whole(*of) - int(len(of[1]) == 1))
    monkeypatch.setenv("NANOTRON_FAST_FUSED_MATMUL", fused)
    case = OddCase(
        spec=spec, family=family, dtype=torch.bfloat16, recompute=recompute, has_documents=True
    )
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "torch")
    exact, gradients = trained(replace(case, dtype=torch.float32), 2)
    theirs, their_gradients = trained(case, 2)
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
    ours, our_gradients = trained(case, 2)
    for mine, other, (loss, norm) in zip(ours, theirs, exact, strict=True):
        assert mine != other  # which computes in another order
        assert mine == pytest.approx((loss, norm), rel=5e-3)
    for name, gradient in gradients.items():
        errors = [
            float((each[name] - gradient).norm() / gradient.norm())
            for each in (our_gradients, their_gradients)
        ]
        assert errors[0] <= 1.5 * errors[1] + 2e-3, (name, errors)
