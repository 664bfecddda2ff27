"""Telling a store that refuses, or that no key was found for, from one that failed for a moment."""

from __future__ import annotations

import re

# What clients call the errors of their search for a key: they have no common base.
_NO_KEY = re.compile(
    r"(No|Partial|Default|Missing|Invalid|Expired)?Credentials?(Retrieval|NotFound|Unavailable)?Error"
    r"|RefreshError|ClientAuthenticationError|ProfileNotFound|GatedRepoError"
    r"|(Unauthorized)?SSO(TokenLoad|Token)?Error|Token(NotFound|Retrieval)Error|LocalTokenNotFoundError"
)
_REFUSED = (401, 403)


def is_refusal(error: BaseException | None) -> bool:
    """Whether a store does not know who asks, or does not let him: another try changes nothing."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, PermissionError) or _status_of(error) in _REFUSED:
            return True
        if any(_NO_KEY.fullmatch(kind.__name__) for kind in type(error).__mro__):
            return True
        error = error.__cause__
    return False


def _status_of(error: BaseException) -> object:
    """What HTTP said, as the clients of aiohttp, requests, httpx, Azure, Google and S3 keep it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        told = response.get("ResponseMetadata")
        return told.get("HTTPStatusCode") if isinstance(told, dict) else None
    for place in (error, response):
        for name in ("status", "status_code", "code"):
            status = getattr(place, name, None)
            if isinstance(status, int):
                return status
    return None
