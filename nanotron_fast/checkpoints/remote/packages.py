"""Which package reaches which store, and how it is had."""

from __future__ import annotations

from nanotron_fast.extras import EXTRAS, require

# What of the extra "s3" a protocol needs. All others have packages that are no extra of ours.
_NEEDED = {"s3": EXTRAS["s3"], "s3a": EXTRAS["s3"], "hf": ("fsspec",)}
# What to give pip for those others: packages that bring fsspec, or it beside them.
_PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "http": "aiohttp fsspec",
    "https": "aiohttp fsspec",
    "oci": "ocifs",
    "sftp": "paramiko fsspec",
    "ssh": "paramiko fsspec",
}


def require_store(*places: object) -> None:
    """Before anything is read: raises MissingPackageError for what cannot be reached.

    Directories and the ids of models on the Hub need nothing.
    """
    for place in places:
        if not isinstance(place, str):
            continue
        protocol, separator, _ = place.partition("://")
        protocol = protocol.lower()
        if separator and protocol in _NEEDED:
            require("s3", f"a URL of {protocol}://", _NEEDED[protocol])


def package_for(protocol: str) -> str:
    """What pip is to install for URLs of a protocol that no extra is for."""
    return _PACKAGES.get(protocol, "fsspec and its package for such URLs")
