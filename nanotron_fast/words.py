"""What a misspelt word may have been meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

# A word that is less like another was not meant to be it.
_LEAST_LIKENESS = 0.6
# Beside the likest one, those that are as like it but for this.
_MARGIN = 0.05


def closest(word: str, known: Iterable[str]) -> list[str]:
    """The words that one may have been meant to be, likest first; dashes before them do not count,
    and within them are as underscores.

    Of a single letter: those that begin with it.
    """
    bare = _bare(word).lower()
    if len(bare) == 1:
        return sorted(each for each in known if _bare(each).startswith(bare))
    ratios = {each: SequenceMatcher(None, bare, _bare(each)).ratio() for each in sorted(set(known))}
    best = max(ratios.values(), default=0.0)
    if best < _LEAST_LIKENESS:
        return []
    near = [each for each, ratio in ratios.items() if ratio >= max(_LEAST_LIKENESS, best - _MARGIN)]
    return sorted(near, key=lambda each: -ratios[each])


def meant(word: str, known: Iterable[str]) -> str:
    """The end of a message: "; did you mean --dtype?", or nothing."""
    *others, last = closest(word, known) or [""]
    listed = f"{', '.join(others)} or {last}" if others else last
    return f"; did you mean {listed}?" if last else ""


def _bare(word: str) -> str:
    return word.lstrip("-").replace("_", "-")
