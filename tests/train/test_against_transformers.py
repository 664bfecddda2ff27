"""Ten steps of a run beside a loop over transformers' model with torch's AdamW and clipping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanotron_fast.train import Trainer, TrainingConfig
from nanotron_fast.train.metrics import read_metrics
from nanotron_fast.train.schedule import learning_rate
from tests.models.tiny import TINY, VOCAB
from tests.modelzoo import make
from tests.train.configs import document

STEPS, MICRO_BATCHES, ROWS, LENGTH = 10, 2, 2, 16
MAX_NORM, DECAY, BETAS, EPS = 0.5, 0.1, (0.9, 0.95), 1e-8
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}, 1e-6),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}, 1e-6),
    "mistral, window": ("mistral", {"sliding_window": 7}, 1e-6),
    "qwen2": ("qwen2", {}, 1e-6),
    # transformers gives the embedding of a padding token no gradient.
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0], "pad_token_id": None}, 1e-6),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": [1]}, 1e-5),
}


def batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (MICRO_BATCHES * ROWS, LENGTH + 1)
    return [torch.randint(VOCAB, shape, generator=generator) for _ in range(steps)]


def of_transformers(hf: Path, config: TrainingConfig, steps: int) -> list[tuple[float, float]]:
    """The loss and the norm of the gradient of each step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager"
    )
    named = dict(model.named_parameters())
    norms = [tensor for name, tensor in named.items() if "norm" in name]
    others = [tensor for name, tensor in named.items() if "norm" not in name]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, weight_decay=DECAY)
    found = []
    for step, tokens in enumerate(batches(steps), 1):
        total = 0.0
        for rows in tokens.split(ROWS):
            logits = model(rows[:, :-1]).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
            (loss / MICRO_BATCHES).backward()
            total += loss.item() / MICRO_BATCHES
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer.learning_rate_scheduler, step)
        optimizer.step()
        optimizer.zero_grad()
        found.append((total, norm.item()))
    return found


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, changes, tolerance = CASES[name]
    hf = make(family, dtype="F32", **{**TINY, **changes}).save(tmp_path / "hf")
    check_steps(hf, tmp_path / "run", STEPS, tolerance)


def check_steps(hf: Path, run: Path, steps: int, tolerance: float) -> None:
    """Losses and norms of the gradients of as many steps, relative to those of transformers."""
    config = TrainingConfig.from_dict(
        document(
            model={"init_method": {"path": str(hf)}, "dtype": "float32"},
            checkpoints__checkpoints_path=str(run),
            tokens__train_steps=steps,
            tokens__sequence_length=LENGTH,
            tokens__micro_batch_size=ROWS,
            tokens__batch_accumulation_per_replica=MICRO_BATCHES,
            optimizer__weight_decay=DECAY,
            optimizer__clip_grad=MAX_NORM,
            optimizer__weight_decay_exclude_named_params=[".*norm"],
            optimizer__learning_rate_scheduler={
                "learning_rate": 3e-3,
                "lr_warmup_steps": 3,
                "lr_decay_style": "cosine",
                "min_decay_lr": 1e-4,
            },
        )
    )
    Trainer(config, batches=batches(steps), device="cpu", is_quiet=True).run()
    ours = read_metrics(run / "metrics.jsonl")
    for line, (loss, norm) in zip(ours, of_transformers(hf, config, steps), strict=True):
        for key, theirs in (("loss", loss), ("grad_norm", norm)):
            error = abs(line[key] - theirs) / theirs
            assert error <= tolerance, f"{key} of step {line['step']}: {error:.1e}"
