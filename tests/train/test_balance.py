"""Experts that are balanced by a loss, or by a bias that each step moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanotron_fast.errors import ConfigError
from nanotron_fast.models import Decoder, build
from nanotron_fast.models.experts import Experts
from nanotron_fast.train.metrics import read_metrics
from tests.families import zoo
from tests.modelzoo import make
from tests.train.runs import train
from tests.train.test_against_transformers import batches


def run(root: Path, hf: Path, **changes: Any) -> None:
    train(
        root,
        batches=batches(2),
        **{
            "model": {"init_method": {"path": str(hf)}, "dtype": "float32"},
            "tokens__train_steps": 1,
            **changes,
        },
    )


def biases_of(folder: Path) -> list[Tensor]:
    """Of every layer of experts, as they were saved."""
    from safetensors.torch import load_file

    paths = sorted(folder.rglob("model_correction_bias.safetensors"))
    return [load_file(path)["data"] for path in paths]


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_bias_moves_against_the_load_of_a_step(
    recomputes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = zoo.save("deepseek_v3", tmp_path / "hf")
    chosen: dict[Any, list[Tensor]] = {}
    choose, forward = Experts._chosen, Decoder.forward
    is_forward = False

    def choosing(self: Experts, scores: Tensor) -> Any:
        found = choose(self, scores)
        if is_forward:
            chosen.setdefault(self, []).append(found[1].flatten())
        return found

    def passing(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_forward
        is_forward = True
        try:
            return forward(self, *args, **kwargs)
        finally:
            is_forward = False

    monkeypatch.setattr(Experts, "_chosen", choosing)
    monkeypatch.setattr(Decoder, "forward", passing)
    run(
        tmp_path / "run",
        hf,
        optimizer__router_bias_rate=0.01,
        parallelism__recompute_layer=recomputes,
        checkpoints__save_initial_state=True,
    )
    before, after = (biases_of(tmp_path / "run" / step) for step in ("0", "1"))
    assert len(before) == len(chosen) > 1
    for one, other, tokens in zip(before, after, chosen.values(), strict=True):
        assert len(tokens) == 2  # micro-batches
        load = torch.cat(tokens).bincount(minlength=len(one)).double()
        assert load.max() > load.min()
        torch.testing.assert_close(other, one + 0.01 * (load.mean() - load).sign().float())


def test_a_loss_joins_in_the_gradient_and_not_in_the_figure(tmp_path: Path) -> None:
    """With the weight that is asked for, over all micro-batches."""
    hf = zoo.save("mixtral", tmp_path / "hf")
    run(tmp_path / "run", hf, optimizer__router_aux_loss=0.1)
    (found,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    squares, total = {}, 0.0
    for weight in (0.0, 0.1):
        model = build(hf, auxiliary_loss=weight / 2)
        total = 0.0
        for rows in batches(1)[0].split(2):
            loss = model(rows[:, :-1], labels=rows[:, 1:]) / 2
            loss.backward()
            total += loss.item()
        squares[weight] = sum(float(each.grad.square().sum()) for each in model.parameters())
    assert found["loss"] == pytest.approx(total, rel=1e-6)
    assert found["grad_norm"] == pytest.approx(squares[0.1] ** 0.5, rel=1e-5)
    assert abs(squares[0.1] / squares[0.0] - 1) > 1e-3


def test_what_there_is_nothing_of_is_not_balanced(tmp_path: Path) -> None:
    hf = zoo.save("mixtral", tmp_path / "hf")
    with pytest.raises(ConfigError, match="without a correction bias: router_aux_loss balances"):
        run(tmp_path / "run", hf, optimizer__router_bias_rate=0.01)
    dense = make("llama", num_hidden_layers=1).save(tmp_path / "dense")
    for key in ("router_bias_rate", "router_aux_loss"):
        with pytest.raises(ConfigError, match=f"{key} is 0.01, and the model has no experts"):
            run(tmp_path / "run", dense, **{f"optimizer__{key}": 0.01})
