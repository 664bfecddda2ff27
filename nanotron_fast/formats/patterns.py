"""Names picked by shell patterns, such as `v_head.*`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence


def unmatched(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """A warning for each of the patterns that no name matches."""
    names = list(names)
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return [
        f"--ignore-tensors {pattern}: no tensor has such a name"
        for pattern in patterns
        if not matching(names, [pattern])
    ]


def matching(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The names that match one of the shell patterns; one pattern may be given by itself."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return tuple(name for name in names if matches(name, patterns))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
