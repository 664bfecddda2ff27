"""What a configuration asks for reaches the model and the optimizer of a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanotron_fast.train.architecture import architecture
from nanotron_fast.train.engine import Engine, engine_of
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.metrics import read_metrics
from tests.train.configs import MODEL_CONFIG
from tests.train.runs import config, train

QWEN2: dict[str, Any] = {
    "is_qwen2_config": True,
    **{key: value for key, value in MODEL_CONFIG.items() if key != "is_llama_config"},
}


def engine(**changes: Any) -> Engine:
    read = config(Path("run"), **changes)
    plan = architecture(read)
    full = read.with_model_config(plan.model_config)
    return engine_of(full, plan.architecture, Mesh(device=torch.device("cpu")))


def test_mup_has_its_own_deviations_and_learning_rates() -> None:
    built = engine(
        model__init_method={"use_mup": True},
        optimizer__learning_rate_scheduler={"learning_rate": 1e-3},
    )
    peaks = {
        each.name: peak
        for each, (peak, _) in zip(built.trained, built.optimizer.constants(), strict=True)
    }
    prefix = "model.decoder.0.pp_block"
    # fan_out / fan_in of a hidden size of 64 and an MLP of 160, which are packed in pairs.
    for name, factor in (
        (f"{prefix}.mlp.down_proj.weight", 64 / 160),
        (f"{prefix}.mlp.gate_up_proj.weight", 320 / 64),
        (f"{prefix}.input_layernorm.weight", 1.0),
        ("model.token_position_embeddings.pp_block.token_embedding.weight", 1.0),
    ):
        assert peaks[name] == pytest.approx(1e-3 * factor), name
    down = built.parts[0].get_parameter(f"{prefix}.mlp.down_proj.weight").detach()
    expected = (1 / 160) ** 0.5 * min(1.0, (64 / 160) ** 0.5)
    assert float(down.std()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("method", "ratio"), [("NUM_LAYERS", 8**0.5), ("NONE", 1.0)])
def test_random_weights_have_the_deviation_of_the_configuration(method: str, ratio: float) -> None:
    init = {"std": 0.05, "scaling_method": method}
    (part,) = engine(model__init_method=init).parts
    prefix = "model.decoder.0.pp_block.mlp"
    up = part.get_parameter(f"{prefix}.gate_up_proj.weight").detach().std()
    down = part.get_parameter(f"{prefix}.down_proj.weight").detach().std()
    assert float(up) == pytest.approx(0.05, rel=0.05)
    assert float(up / down) == pytest.approx(ratio, rel=0.05)


def test_weight_decay_leaves_out_what_a_pattern_names() -> None:
    built = engine(
        optimizer__weight_decay=0.1,
        optimizer__weight_decay_exclude_named_params=[".*layernorm", ".*layer_norm"],
    )
    for each, (_, decay) in zip(built.trained, built.optimizer.constants(), strict=True):
        assert decay == (0.0 if "norm" in each.name else 0.1), each.name


def test_a_z_loss_is_that_of_the_model_config(tmp_path: Path) -> None:
    """By the first loss of a run: before the update it is that of the initial weights."""
    z_loss = {"z_loss_enabled": True, "z_loss_coefficient": 0.5}
    losses = {}
    for name, model in (("plain", QWEN2), ("z", {**QWEN2, **z_loss})):
        train(tmp_path / name, model__model_config=model, tokens__train_steps=1)
        losses[name] = read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"]
    assert losses["z"] > losses["plain"] + 0.1
    (part,) = engine(model__model_config={**QWEN2, **z_loss}).parts
    assert part.z_loss == 0.5


def test_layers_are_recomputed_where_that_is_asked_for() -> None:
    assert [
        engine().parts[0].recompute,
        *(part.recompute for part in engine(parallelism__recompute_layer=True).parts),
    ] == ["none", "layer"]
