"""The section `optimizer`.

Names, order and defaults of the fields are those of nanotron/config/config.py at 2411b022; Muon is
ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from nanotron_fast.train.config.place import Place
from nanotron_fast.train.config.schema import (
    FILLED,
    OURS,
    Above,
    Amount,
    AtLeast,
    Count,
    Fraction,
    Spelled,
    ToldApart,
)

Positive = Annotated[float, Above(0)]
NotNegative = Annotated[float, AtLeast(0)]
NAMES = ("adamW", "muon")


def _optimizer_name(text: str) -> str:
    """As it is kept, whatever the case."""
    return {name.lower(): name for name in NAMES}.get(text.lower(), text)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """AdamW with decoupled weight decay.

    `torch_adam_is_fused` has no effect: the step is fused in any case.
    """

    adam_eps: NotNegative
    adam_beta1: Fraction
    adam_beta2: Fraction
    torch_adam_is_fused: bool
    name: Annotated[Literal["adamW"], Spelled(_optimizer_name)] = "adamW"


@dataclass(frozen=True, slots=True, kw_only=True)
class Muon:
    """Muon for the hidden matrices, AdamW by the `adam_` fields for everything else.

    Args:
        muon_momentum: of the gradients that are made orthogonal.
        muon_nesterov: look one step ahead of it.
        muon_ns_steps: iterations of Newton and Schulz.
    """

    adam_eps: NotNegative = 1e-8
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    torch_adam_is_fused: bool = True
    name: Annotated[Literal["muon"], Spelled(_optimizer_name)] = "muon"
    muon_momentum: Fraction = 0.95
    muon_nesterov: bool = True
    muon_ns_steps: Count = 5


def _optimizer_kind(document: Mapping[str, Any], place: Place) -> type:
    """Which optimizer a mapping describes; without a name, as in Nanotron, AdamW."""
    name = document.get("name", "adamW")
    kinds = {"adamW": AdamW, "muon": Muon}
    kind = kinds.get(_optimizer_name(name)) if isinstance(name, str) else None
    if kind is None:
        raise place.at("name").wrong(name, " or ".join(NAMES))
    return kind


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRate:
    """How the learning rate goes; `train.schedule` has the formula. Steps of warmup come first.

    Args:
        learning_rate: at its highest.
        lr_warmup_steps: until then.
        lr_warmup_style: from 0 in a line, or the full rate at once.
        lr_decay_style: the curve from there to min_decay_lr.
        lr_decay_steps: how long that takes; None for all steps after the warmup, which a read
            configuration has put here already.
        lr_decay_starting_step: where it begins; None for the end of the warmup.
        min_decay_lr: what remains; None for learning_rate, put here likewise.
    """

    learning_rate: Positive
    lr_warmup_steps: Amount = 0
    lr_warmup_style: Literal["linear", "constant"] = field(default="linear", metadata=FILLED)
    lr_decay_style: Literal["linear", "cosine", "1-sqrt"] = field(default="linear", metadata=FILLED)
    lr_decay_steps: Amount | None = None
    lr_decay_starting_step: Amount | None = None
    min_decay_lr: NotNegative | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """The optimizer, its learning rate, and what else happens to gradients.

    Args:
        optimizer_factory: which, and its constants.
        zero_stage: 1 shares the states of the optimizer out among data-parallel ranks; 3, which is
            ours, the weights and the gradients as well.
        weight_decay: for every parameter that is not excluded.
        clip_grad: the largest norm of all gradients together; None for any.
        accumulate_grad_in_fp32: no effect; gradients are summed in fp32, and the parameters have
            fp32 masters, in any case.
        learning_rate_scheduler: the rate at each step.
        weight_decay_exclude_named_params: regular expressions that match the beginning of a name.
        router_aux_loss: ours; the weight of the loss that balances the experts of each layer,
            `models.experts` has the formula.
        router_bias_rate: ours; by how much each step moves the correction biases of routers towards
            balance, see `train.balance`; 0 leaves them as they are.
    """

    optimizer_factory: Annotated[AdamW | Muon, ToldApart(_optimizer_kind)]
    zero_stage: int
    weight_decay: NotNegative
    clip_grad: Positive | None
    accumulate_grad_in_fp32: bool
    learning_rate_scheduler: LearningRate
    weight_decay_exclude_named_params: tuple[str, ...] = field(default=(), metadata=FILLED)
    router_aux_loss: NotNegative = field(default=0.0, metadata=OURS)
    router_bias_rate: NotNegative = field(default=0.0, metadata=OURS)
