"""What the plans of lists of tensors do, counted."""

from __future__ import annotations

from collections import Counter

import pytest

from nanotron_fast.kernels.optimizer import plan


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts looks at tensors one by one, and tables that are made."""
    counts: Counter[str] = Counter()

    def count(owner: object, name: str, what: str) -> None:
        original = getattr(owner, name)

        def function(*arguments: object) -> object:
            counts[what] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, function)

    count(plan, "_seen", "looks")
    count(plan._Look, "_made", "tables")
    return counts
