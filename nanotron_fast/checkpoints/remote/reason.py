"""Why a request came to nothing, as the end of a sentence; its clients begin with a status."""

from __future__ import annotations

import re

# What the Hub's client calls them, the more special ones first among the classes of an error.
_PLAINLY = {
    "GatedRepoError": "it is gated: ask for it on its page, and sign in by `hf auth login`",
    "RepositoryNotFoundError": "there is no such model, or none that you may read",
    "RevisionNotFoundError": "it has no such revision",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE keeps it from being asked",
}
_NUMBER = re.compile(r"^\[Errno -?\d+\] ")


def reason(error: BaseException) -> str:
    """What an error comes to in one line."""
    kinds = [each.__name__ for each in type(error).__mro__]
    beneath = error.__cause__ or error.__context__
    if "LocalEntryNotFoundError" in kinds and beneath is not None:
        # It speaks of the cache alone; the request failed before.
        found = reason(beneath)
        if found in _PLAINLY.values():
            return found
        return f"it does not answer: {_of_system(beneath) or found}"
    for kind in kinds:
        if kind in _PLAINLY:
            return _PLAINLY[kind]
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return _NUMBER.sub("", first)


def _of_system(error: BaseException | None) -> str | None:
    """What the system said, which clients of the Hub wrap in errors of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        error = error.__cause__ or error.__context__
    return None
