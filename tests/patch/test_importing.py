"""Importing Nanotron, with small packages of that name in place of the real one."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanotron_fast.errors import MissingPackageError
from nanotron_fast.patch import stand_ins
from nanotron_fast.patch.importing import import_nanotron

MODELS = {
    "models/__init__.py": "from nanotron.logging import log_rank\n",
    "models/llama.py": (
        "from flash_attn.flash_attn_interface import flash_attn_varlen_func\n"
        "from nanotron.config import LoggingArgs\n"
        "from nanotron.config.config import Config\n"
    ),
}
# As in the released 0.4: logging needs a name of config.config, which needs logging.
WITH_A_CYCLE = MODELS | {
    "__init__.py": '__version__ = "0.4"\n',
    # Imports a module of its own before it fails.
    "parallel/__init__.py": (
        "import nanotron.parallel.context, nanotron.utils\n"
        "from nanotron.config.config import LoggingArgs\n"
    ),
    "parallel/context.py": "count = 0\n",
    "utils.py": "from nanotron.parallel import context\n",
    "logging.py": (
        "import nanotron.parallel\n"
        "from nanotron.config.config import LoggingArgs\n"
        "nanotron.parallel.context.count += 1\n"
        "def log_rank(config: LoggingArgs) -> None: ...\n"
    ),
    "config/__init__.py": "from nanotron.config.config import *\n",
    "config/config.py": (
        "from nanotron.logging import log_rank\nclass LoggingArgs: ...\nclass Config: ...\n"
    ),
}
WITHOUT = WITH_A_CYCLE | {"logging.py": "def log_rank(): ...\n"}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lays a package called nanotron where it is found first; afterwards nothing is left of it."""
    kept = {name: module for name, module in sys.modules.items() if name.startswith("nanotron.")}
    kept |= {"nanotron": sys.modules["nanotron"]} if "nanotron" in sys.modules else {}

    def forget() -> None:
        for name in [*sys.modules]:
            if name.partition(".")[0] == "nanotron":
                del sys.modules[name]

    def lay(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / "nanotron" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    forget()
    yield lay
    forget()
    sys.modules.update(kept)
    stand_ins.remove_stand_ins()


def test_it_is_imported(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    install(WITHOUT)
    with caplog.at_level(logging.INFO, "nanotron_fast"):
        module = import_nanotron()
    assert Path(module.__file__).is_relative_to(tmp_path)
    assert "nanotron.models.llama" in sys.modules
    assert not caplog.records


@pytest.mark.parametrize("is_tried_before", [False, True])
def test_past_the_cycle(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture, is_tried_before: bool
) -> None:
    install(WITH_A_CYCLE)
    if is_tried_before:
        with pytest.raises(ImportError, match="partially initialized"):
            importlib.import_module("nanotron.config")
    with caplog.at_level(logging.INFO, "nanotron_fast"):
        module = import_nanotron()
    assert len(caplog.records) == 1
    assert "import cycle" in caplog.text
    config = importlib.import_module("nanotron.config.config")
    nanotron_logging = importlib.import_module("nanotron.logging")
    assert module.config.config is config
    assert Path(config.__file__).name == "config.py"
    # Nothing of the placeholder is left.
    assert nanotron_logging.LoggingArgs is config.LoggingArgs
    assert config.LoggingArgs.__module__ == "nanotron.config.config"
    assert nanotron_logging.log_rank.__annotations__["config"] is config.LoggingArgs
    # Only modules that were made once are in use.
    context = sys.modules["nanotron.parallel.context"]
    assert module.parallel.context is context
    assert context.count == 1
    if not is_tried_before:
        assert module.utils.context is context
    caplog.clear()
    assert import_nanotron() is module
    assert not caplog.records


@pytest.mark.parametrize("is_folder", [False, True])
def test_nanotron_is_missing(
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    is_folder: bool,
) -> None:
    if is_folder:
        if importlib.util.find_spec("nanotron"):
            pytest.skip("nanotron is installed here, and goes before a folder")
        install({"README.md": "A folder that is no package.\n"})
    else:
        monkeypatch.setitem(sys.modules, "nanotron", None)
    with pytest.raises(
        MissingPackageError, match="Nanotron is not installed: pip install nanotron"
    ):
        import_nanotron()


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("datasets", r"Nanotron needs datasets, which is not installed: pip install 'datasets<5'"),
        ("yaml", "Nanotron needs yaml, which is not installed: pip install pyyaml"),
        ("dacite", "Nanotron needs dacite, which is not installed: pip install dacite"),
    ],
)
def test_a_package_is_missing(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, package: str, message: str
) -> None:
    install(WITHOUT | {"config/config.py": f"import {package}\n"})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=message) as raised:
        import_nanotron()
    assert raised.value.name == package


def test_a_package_does_not_fit(install: Callable[..., None]) -> None:
    install(WITHOUT | {"config/config.py": "from json import xPath\n"})
    with pytest.raises(
        MissingPackageError, match=r"the installed json do not fit: cannot import .*xPath"
    ):
        import_nanotron()


def test_faults_of_nanotron_itself_pass(install: Callable[..., None]) -> None:
    install(WITHOUT | {"config/config.py": "from nanotron.logging import nonsense\n"})
    with pytest.raises(ImportError, match=r"name 'nonsense' from 'nanotron\.logging'"):
        import_nanotron()
