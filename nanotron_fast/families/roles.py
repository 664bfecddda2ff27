"""What a parameter of a family's table is for, and which matrices it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from nanotron_fast.families.parts import Param

# "column" and "row" are the matrices of the layers, whose output or input features are split; a
# head is an "embedding" of its own, a gate to a shared expert a "column".
Role = Literal["embedding", "head", "column", "row", "router", "norm", "bias"]

_MERGED_GATE_UP = ".merged_gate_up_proj"
# Whose names say what they are, and not how they are cut.
_BY_NAME: Mapping[str, Role] = {
    ".router.weight": "router",
    ".router.correction_bias": "bias",
    ".merged_gate_up_bias": "bias",
    ".merged_down_bias": "bias",
    ".attn.sinks": "bias",
    ".act_fn.alpha_p": "bias",
    ".act_fn.alpha_n": "bias",
    ".act_fn.beta": "bias",
    ".act_fn.eps": "bias",
    ".attn.q_norm.weight": "norm",
    ".attn.k_norm.weight": "norm",
    _MERGED_GATE_UP: "column",
    ".merged_down_proj": "row",
    ".shared_expert_gate.weight": "column",
}


def role_of(param: Param) -> Role:
    """What a parameter of a table is for."""
    if param.name.endswith(".bias"):
        return "bias"
    if param.block in ("embedding", "head"):
        return "embedding" if param.block == "embedding" else "head"
    for suffix, role in _BY_NAME.items():
        if param.name.endswith(suffix):
            return role
    if len(param.shape) == 1:
        return "norm"
    return "row" if param.cuts.get("tp") == 1 else "column"


def is_row_bias(name: str, params: Mapping[str, Param]) -> bool:
    """The bias of a matrix whose input features are cut, among the parameters that hold both.

    Nanotron has it on the first rank of the tensor-parallel group alone.
    """
    weight = params.get(f"{name.removesuffix('.bias')}.weight")
    return name.endswith(".bias") and weight is not None and role_of(weight) == "row"


def is_hidden_matrix(param: Param) -> bool:
    """A matrix of a layer, as Muon takes them: no embedding, head, router, norm or bias."""
    return role_of(param) in ("column", "row") and min(param.shape[-2:]) > 1


def matrices_beside(param: Param) -> int:
    """How many matrices lie beside each other in a parameter's columns.

    Two, gate and up, in the merged experts; what a linear layer packs lies one below another, in
    the parameter's chunks.
    """
    return 2 if param.name.endswith(_MERGED_GATE_UP) else 1
