"""Why a fused operation has left calls to the functions that it stands for.

Whether a whole block may be one function depends on the model that runs, so that it is known when
the model is called, not when the drop-in is turned on. `registry.status()` shows what is kept here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from nanotron_fast.patch.nanotron.targets import ON_DISABLE, Target

logger = logging.getLogger(__name__)

# (operation, "Class.method") -> its reasons, in the order in which they came.
_reasons: dict[tuple[str, str], list[str]] = {}
ON_DISABLE.append(_reasons.clear)


def fall_back(op: str, original: Callable[..., Any], reason: str) -> None:
    """Keeps a reason, and logs it when it comes for the first time.

    Args:
        op: the operation's name.
        original: the method of Nanotron that runs instead.
        reason: a clause that follows "left to Nanotron: ".
    """
    name = getattr(original, "__qualname__", "")
    known = _reasons.setdefault((op, name), [])
    if reason not in known:
        known.append(reason)
        logger.warning("nanotron_fast: %s: %s is left to Nanotron: %s", op, name, reason)


def reasons_of(target: Target) -> str:
    """All reasons of one target since the drop-in was turned on; empty where there is none."""
    return "; ".join(_reasons.get((target.op, target.attribute), ()))
