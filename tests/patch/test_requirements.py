"""What the installed Nanotron needs of other packages, before anything runs."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from nanotron_fast.errors import ConfigError
from nanotron_fast.patch import launcher
from nanotron_fast.patch.nanotron import requirements
from nanotron_fast.patch.nanotron.requirements import check_requirements

FITTING = {"datasets": "4.8.5", "transformers": "4.57.3", "numpy": "1.26.4", "pyarrow": "21.0.0"}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a Nanotron, and says what else is there."""

    def install(
        versions: dict[str, str], *, is_main: bool = True, needs: tuple[str, ...] = ()
    ) -> Path:
        models = tmp_path / "nanotron" / "models"
        models.mkdir(parents=True)
        (models.parent / "__init__.py").write_text("raise AssertionError('imported')\n")
        if is_main:
            (models / "qwen.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "nanotron", raising=False)
        find_spec = requirements.importlib.util.find_spec

        def version(name: str) -> str:
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        known = {*requirements._IMPORTED, *requirements._IMPORTED_BY_MAIN}
        monkeypatch.setattr(requirements.metadata, "version", version)
        monkeypatch.setattr(requirements.metadata, "requires", lambda name: [*needs])
        monkeypatch.setattr(
            requirements.importlib.util,
            "find_spec",
            lambda name, *rest: (
                None
                if name in known and name in versions.get("absent", "")
                else object()
                if name in known
                else find_spec(name, *rest)
            ),
        )
        return tmp_path / "nanotron"

    return install


def test_what_fits_passes(machine) -> None:
    machine(FITTING)
    check_requirements()


def test_every_mismatch_is_in_one_message(machine) -> None:
    folder = machine({**FITTING, "datasets": "5.0.1", "transformers": "5.2.0", "numpy": "2.2.6"})
    with pytest.raises(ConfigError) as raised:
        check_requirements()
    message = str(raised.value)
    assert message.startswith(f"Nanotron main ({folder}) does not fit what is installed: ")
    for words in ("datasets 5.0.1", "transformers 5.2.0", "numpy 2.2.6", "needs numpy<2"):
        assert words in message
    assert message.endswith("pip install 'datasets<5' 'transformers<5' 'numpy<2'")


def test_what_is_missing_is_named_with_its_bound(machine) -> None:
    machine({**FITTING, "absent": "datasets einops"})
    with pytest.raises(ConfigError, match="datasets is not installed; einops is not") as raised:
        check_requirements()
    assert str(raised.value).endswith("pip install 'datasets<5' einops")


def test_the_released_one_is_held_to_its_own_metadata(machine) -> None:
    newest = {"datasets": "5.0.1", "transformers": "5.2.0", "numpy": "2.2.6", "dacite": "1.9"}
    needs = ("numpy", "dacite>=2", "flash-attn<2.7; extra == 'fast-modeling'", "not a line!")
    machine({**newest, "absent": "einops", "flash-attn": "2.8"}, is_main=False, needs=needs)
    with pytest.raises(ConfigError) as raised:
        check_requirements()
    message = str(raised.value)
    assert "dacite 1.9, and it needs dacite>=2 (its own metadata says so)" in message
    assert message.endswith("pip install 'dacite>=2'")


def test_the_launcher_checks_before_it_imports(machine, tmp_path: Path) -> None:
    machine({**FITTING, "numpy": "2.0.0"})
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError('it ran')")
    with pytest.raises(ConfigError, match=r"numpy 2\.0\.0"):
        launcher.run(str(script), [], on_cpu=True)
