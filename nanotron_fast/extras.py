"""What only some uses need to have installed, and how each says so where it is missing.

The names are those of the extras in pyproject.toml: `pip install 'nanotron_fast[train]'`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence

from nanotron_fast.errors import MissingPackageError

_KERNELS = ("torch", "triton")
# Without what each extra can do nothing. `datasets` is asked for where a dataset of it is read.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "kernels": _KERNELS,
    "logits": (*_KERNELS, "transformers", "safetensors"),
    "train": (*_KERNELS, "transformers"),
    "s3": ("fsspec", "s3fs"),
    "plot": ("matplotlib",),
}


def require(extra: str, what: str, packages: Sequence[str] | None = None) -> None:
    """Raises MissingPackageError where packages are not there. Imports none of them.

    Args:
        extra: the name of the extra that has them.
        what: what needs them, as the message begins.
        packages: their names for Python; by default those of `EXTRAS`.
    """
    missing = [name for name in packages or EXTRAS[extra] if not is_installed(name)]
    if missing:
        raise MissingPackageError(
            f"{what} needs {listed(missing)}, not installed here: "
            f"pip install 'nanotron_fast[{extra}]'",
            name=missing[0],
        )


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: a, b and c."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def is_installed(name: str) -> bool:
    """Whether a package can be found. Triton counts as found where there is none to install."""
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None or (
        name == "triton" and sys.platform != "linux"
    )
