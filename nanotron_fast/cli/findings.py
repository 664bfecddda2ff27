"""One thing that `nanotron-fast doctor` has looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, and how it is.

    Args:
        state: "broken" where nothing can work with it, "missing" where something cannot be done,
            "slow" where it takes longer than it could.
        found: in words, with the numbers.
        remedy: how to mend it; empty where there is nothing to mend.
    """

    name: str
    state: Literal["ok", "slow", "missing", "broken"]
    found: str
    remedy: str = ""
