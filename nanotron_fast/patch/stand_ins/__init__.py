"""Stands in for the packages that Nanotron imports and few can install: flash_attn, grouped_gemm.

Each folder here is a package that carries the real one's name once `install_stand_ins` has put it
into `sys.modules`, and holds what Nanotron (0.4, and main of April 2026) takes from it: the same
names, arguments, defaults, shapes and dtypes, over our kernels, on a GPU and on the CPU. An
argument that is not supported raises NotImplementedError with its name. A package that is really
installed is left alone. Within a package imports are relative: so each module is there once, under
the real name.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGES = ("flash_attn", "grouped_gemm")
# True in a package of ours: `getattr(sys.modules["flash_attn"], MARK, False)`.
MARK = "__nanotron_fast__"


def is_stand_in(package: str) -> bool:
    """Whether the package of this name that is imported now is ours."""
    return bool(getattr(sys.modules.get(package), MARK, False))


def install_stand_ins() -> tuple[str, ...]:
    """Puts a stand-in into `sys.modules` for each package that is absent. Returns their names."""
    installed = []
    for package in PACKAGES:
        if not _is_there(package):
            _import(package)
            installed.append(package)
    return tuple(installed)


def remove_stand_ins() -> tuple[str, ...]:
    """Takes our packages out of `sys.modules`. Returns their names.

    Modules that have imported from them keep what they have.
    """
    removed = tuple(package for package in PACKAGES if is_stand_in(package))
    for name in [*sys.modules]:
        if name.partition(".")[0] in removed:
            del sys.modules[name]
    return removed


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that somebody made by hand: theirs
        return True


def _import(package: str) -> None:
    """Makes a package under its own name; its submodules are found by its __path__ when wanted."""
    spec = PathFinder.find_spec(package, [str(Path(__file__).parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[package]
        raise
