"""A small package called nanotron, made of the texts of its modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from nanotron_fast.patch import stand_ins
from nanotron_fast.patch.nanotron.registry import disable

# What is imported of any Nanotron.
_ALWAYS = {
    "__init__.py": "",
    "logging.py": "",
    "config/__init__.py": "",
    "models/__init__.py": "",
    "models/llama.py": "",
}


def _forget() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "nanotron"]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def small_nanotron(
    folder: Path, monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str]
) -> Iterator[dict[str, ModuleType]]:
    """The modules of `files`, path -> text, by their names without "nanotron.".

    At the end the drop-in is off, and what was called nanotron before is there again.
    """
    kept = _forget()
    for path, text in {**_ALWAYS, **files}.items():
        target = folder / "nanotron" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    monkeypatch.syspath_prepend(folder)
    names = [
        path.removesuffix(".py").replace("/", ".")
        for path in files
        if not path.endswith("__init__.py")
    ]
    try:
        yield {name: importlib.import_module(f"nanotron.{name}") for name in names}
    finally:
        disable()
        _forget()
        sys.modules.update(kept)
        stand_ins.remove_stand_ins()
