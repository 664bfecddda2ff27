"""Telling a place in a store from a path: `s3://bucket/model`, `hf://org/model@v1`."""

from __future__ import annotations

import re
from pathlib import Path

from nanotron_fast.errors import ConfigError

_PROTOCOL = r"[A-Za-z][A-Za-z0-9+.-]*"
_URL = re.compile(
    rf"(?P<outer>({_PROTOCOL}::)*)(?P<protocol>{_PROTOCOL})://(?P<path>.*)", re.DOTALL
)
_FILE = re.compile(r"(?:file|local):(?://(?P<host>[^/]*))?(?P<path>/.*)", re.DOTALL | re.IGNORECASE)
# What messages call it.
DESTINATION = "the destination"
_PASSWORD = re.compile(r"(//[^/@:]*):[^/@]*@")


def without_password(url: str) -> str:
    """A URL as it may be shown and written down."""
    return _PASSWORD.sub(r"\1@", url).rstrip("/")


def is_url(place: object) -> bool:
    """Whether somebody names a place in a store, and not a path."""
    return isinstance(place, str) and _URL.match(place) is not None


def as_path(place: str | Path, what: str) -> str | Path:
    """The path that a file:// URL stands for, which is a folder like any; all else as it is.

    Args:
        what: is there, such as "the destination".

    Raises ConfigError where it names another machine, or is empty, which Path takes for ".".
    """
    if place == "":
        raise ConfigError(f"{what}: an empty string names no place; is a variable not set?")
    match = _FILE.fullmatch(place) if isinstance(place, str) else None
    if match is None:
        return place
    if (match["host"] or "localhost").lower() != "localhost":
        raise ConfigError(
            f"{place}: it names a file of the machine {match['host']!r}; a path of this one begins "
            "with file:///"
        )
    return match["path"]


def on_disk(place: str | Path, what: str) -> Path:
    """A path, for what is not read from stores. Raises ConfigError for a URL of one.

    Args:
        what: is there, such as "the run".
    """
    place = as_path(place, what)
    if is_url(place):
        raise ConfigError(
            f"{without_password(str(place))}: convert, verify and inspect work with URLs, and "
            f"nothing else does; {what} must be on a disk"
        )
    return Path(place)


def split(url: str) -> tuple[str, str]:
    """The protocol, in small letters, and what is behind `://`. Raises ConfigError."""
    match = _URL.match(url)
    assert match is not None
    shown = without_password(url)
    if match["outer"]:
        plain = f"{match['protocol'].lower()}://{match['path']}"
        raise ConfigError(
            f"{shown}: one protocol in front of another is not taken; {without_password(plain)} "
            "is read in ranges, and nothing is kept of it"
        )
    if not match["path"].strip("/"):
        raise ConfigError(f"{shown}: it names no folder")
    return match["protocol"].lower(), match["path"]
