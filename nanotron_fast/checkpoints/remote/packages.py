"""Which package reaches which store, and how it is had."""

from __future__ import annotations

from pathlib import Path

from nanotron_fast.extras import EXTRAS, require

# What of the extra "s3" a protocol needs. All others have packages that are no extra of ours.
_NEEDED = {"s3": EXTRAS["s3"], "s3a": EXTRAS["s3"], "hf": ("fsspec",)}
# What to give pip.
_PACKAGES = {
    "s3": "'nanotron_fast[s3]'",
    "s3a": "'nanotron_fast[s3]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "http": "aiohttp fsspec",
    "https": "aiohttp fsspec",
    "oci": "ocifs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "hf": "huggingface_hub",
}


def require_store(*places: str | Path) -> None:
    """Before anything is read: raises MissingPackageError for what cannot be reached.

    Directories and the ids of models on the Hub need nothing.
    """
    for place in places:
        protocol, separator, _ = str(place).partition("://")
        if separator and isinstance(place, str) and protocol in _NEEDED:
            require("s3", f"a URL of {protocol}://", _NEEDED[protocol])


def package_for(protocol: str) -> str:
    """What pip is to install for URLs of a protocol."""
    return _PACKAGES.get(protocol, "fsspec and its package for such URLs")
