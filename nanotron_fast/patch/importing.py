"""Imports Nanotron as it is installed, past what stops it: flash-attn, and a cycle in PyPI's 0.4.

In the released 0.4 `nanotron.logging` imports `LoggingArgs` from `nanotron.config.config`, which
imports `nanotron.logging`: whichever comes first, the import fails. The name serves one annotation.
So a placeholder with that name lies in `sys.modules` while `nanotron.logging` is imported; then it
is taken away, the real `nanotron.config` is imported, and the name and the annotation become the
real class's.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from types import ModuleType

from nanotron_fast.errors import MissingPackageError
from nanotron_fast.patch.stand_ins import install_stand_ins

logger = logging.getLogger(__name__)

# What every model needs. Each imports the ones before it.
_MODULES = ("nanotron.logging", "nanotron.config", "nanotron.models.llama")
_CONFIG = ("nanotron.config", "nanotron.config.config")

# Packages whose name for pip is another than for Python, or that must not be the newest.
_REQUIREMENTS = {
    "datasets": "'datasets<5'",
    "nanotron": "nanotron==0.4",
    "numpy": "'numpy<2'",
    "transformers": "'transformers<5'",
    "yaml": "pyyaml",
}


def import_nanotron() -> ModuleType:
    """Imports Nanotron, so that all its modules can be imported from then on. Returns `nanotron`.

    Puts stand-ins in place of flash_attn and grouped_gemm where these are absent; they stay, since
    Nanotron imports from them while it runs too.

    Raises:
        MissingPackageError: Nanotron, or a package that it needs, is not installed, or the package
            lacks what Nanotron takes from it.
        ImportError: Nanotron itself is at fault.
    """
    spec = importlib.util.find_spec("nanotron")
    if spec is None or spec.origin is None:  # a mere folder of that name has no origin
        raise MissingPackageError(
            _missing("Nanotron is not installed", "nanotron"), name="nanotron"
        )
    install_stand_ins()
    try:
        _import_all()
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "nanotron"):
            raise
        if isinstance(error, ModuleNotFoundError):
            what = f"Nanotron needs {error.name}, which is not installed"
            raise MissingPackageError(_missing(what, package), name=error.name) from error
        what = f"Nanotron and the installed {package} do not fit: {error}"
        said = _missing(what, package)
        raise MissingPackageError(said, name=error.name, path=error.path) from error
    return sys.modules["nanotron"]


def _missing(what: str, package: str) -> str:
    return f"{what}: pip install {_REQUIREMENTS.get(package, package)}"


def _import_all() -> None:
    before = set(sys.modules)
    try:
        importlib.import_module(_MODULES[0])
    except ImportError as error:
        if not _is_cycle(error):
            raise
        _forget(before)
        logger.warning("nanotron_fast: got past Nanotron's import cycle (logging and config)")
        _import_past_the_cycle()
    for name in _MODULES:
        importlib.import_module(name)


def _forget(before: set[str]) -> None:
    """Drops the modules that a failed import has left, which hold on to others that are made anew.

    Those are the ones that came since `before`, and those without their package that an earlier
    failure left.
    """
    for name in sorted(sys.modules):
        package, _, _ = name.rpartition(".")
        is_orphan = bool(package) and package not in sys.modules
        if name.startswith("nanotron.") and (name not in before or is_orphan):
            del sys.modules[name]


def _is_cycle(error: ImportError) -> bool:
    """Whether a module of Nanotron lacked a name because its own import had not ended yet."""
    name = error.name or ""
    return name.startswith("nanotron.") and "partially initialized module" in str(error)


def _import_past_the_cycle() -> None:
    placeholder = type("LoggingArgs", (), {})
    package, module = (ModuleType(name, "A placeholder of nanotron_fast.") for name in _CONFIG)
    package.__path__ = []
    vars(module)["LoggingArgs"] = placeholder
    sys.modules.update({_CONFIG[0]: package, _CONFIG[1]: module})
    try:
        nanotron_logging = importlib.import_module("nanotron.logging")
    finally:
        for name in _CONFIG:
            del sys.modules[name]
    real = importlib.import_module(_CONFIG[1]).LoggingArgs
    _replace(nanotron_logging, placeholder, real)


def _replace(module: ModuleType, placeholder: type, real: type) -> None:
    """Puts the real class into a module's names and into the annotations of its functions."""
    for name, value in [*vars(module).items()]:
        if value is placeholder:
            setattr(module, name, real)
        elif inspect.isfunction(value):
            for parameter, annotation in value.__annotations__.items():
                if annotation is placeholder:
                    value.__annotations__[parameter] = real
