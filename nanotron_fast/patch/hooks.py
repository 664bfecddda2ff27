"""Whether a module may be gone past: what watches or replaces its call must see it.

An operation of ours that takes the place of several modules calls some of them no more. Where one
of those has hooks, or a forward of its own, the operation steps aside for that module.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as of_all_modules

_KINDS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")


def why_not_past(module: Any) -> str:
    """Why a module has to be called as itself; empty where nobody would notice."""
    own = vars(module)
    if "forward" in own:
        return "its forward was replaced by somebody else"
    if any(own.get(f"_{kind}") for kind in _KINDS):
        return "it has hooks, which would not run"
    if any(getattr(of_all_modules, f"_global_{kind}", None) for kind in _KINDS):
        return "there are hooks of all modules, which would not run"
    return ""


def may_go_past(*modules: Any) -> bool:
    """Whether none of them would be missed. What is no module has no hooks."""
    return not any(isinstance(each, nn.Module) and why_not_past(each) for each in modules)
