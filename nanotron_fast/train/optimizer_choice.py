"""The optimizer that a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanotron_fast.train.config import AdamW as AdamWSection
from nanotron_fast.train.config import TrainingConfig
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.muon import Muon
from nanotron_fast.train.optimizer import AdamW
from nanotron_fast.train.parameters import Trained


def optimizer_of(
    config: TrainingConfig,
    trained: Sequence[Trained],
    mesh: Mesh,
    peaks: Mapping[str, float] | None = None,
) -> AdamW:
    """The optimizer of a rank, Muon being one that is an AdamW too.

    Args:
        trained: all parameters of this rank, with their values.
        peaks: the highest learning rates of parameters that have another one, by name.
    """
    section = config.optimizer
    factory = section.optimizer_factory
    common: dict[str, Any] = {
        "learning_rate": section.learning_rate_scheduler.learning_rate,
        "betas": (factory.adam_beta1, factory.adam_beta2),
        "eps": factory.adam_eps,
        "weight_decay": section.weight_decay,
        "excluded": section.weight_decay_exclude_named_params,
        "peaks": peaks,
        "zero_stage": section.zero_stage,
    }
    if isinstance(factory, AdamWSection):
        return AdamW(trained, mesh, **common)
    return Muon(
        trained,
        mesh,
        momentum=factory.muon_momentum,
        nesterov=factory.muon_nesterov,
        ns_steps=factory.muon_ns_steps,
        **common,
    )
