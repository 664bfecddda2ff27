"""What a user installs: the sdist, the wheel made from it, that wheel away from the repository."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "kernels", "nanotron_fast")

# Run away from the repository: says where each name was found.
WHERE = """
import importlib.util, json
from importlib.metadata import entry_points, version
import nanotron_fast
import nanotron_fast._C
kernels = importlib.util.find_spec("kernels")
print(json.dumps({
    "_C": nanotron_fast._C.__file__,
    "nanotron_fast": nanotron_fast.__file__,
    "nanotron_fast.kernels": importlib.util.find_spec("nanotron_fast.kernels").origin,
    "kernels": kernels and (kernels.origin or str(list(kernels.submodule_search_locations))),
    "__version__": nanotron_fast.__version__,
    "metadata": version("nanotron_fast"),
    "commands": {e.name: e.value for e in entry_points(group="console_scripts")},
}))
"""


def files_of(folder: str) -> set[str]:
    """Paths of what we wrote in a folder, from the repository's root."""
    written = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT).as_posix()
        for path in written
        if path.suffix not in {".so", ".pyc"} and "__pycache__" not in path.parts
    }


def where(cwd: Path, *, pythonpath: str = "") -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", WHERE],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": pythonpath},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and the wheel made from it.

    Made from a copy, since a stale build/ or egg-info would lend files that MANIFEST.in forgot.
    """
    tree = tmp_path_factory.mktemp("packaging")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored, symlinks=True)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation"],
        cwd=tree,
        # The contents matter here, not the speed; and not what this machine happens to have.
        env={**os.environ, "CXXFLAGS": "-O0", "NANOTRON_FAST_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist"


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.mark.slow
def test_sdist_holds_every_source(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = set().union(*map(files_of, FOLDERS))
    expected |= {
        "setup.py",
        "setup_cuda.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
    }
    assert expected - names == set()
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    extensions = {name for name in names if name.endswith(".so")}
    kernels = {f"nanotron_fast/{name}" for name in files_of("kernels")}
    assert names - extensions == files_of("nanotron_fast") | kernels
    assert len(extensions) == 1
    assert extensions.pop().startswith("nanotron_fast/_C.")


@pytest.mark.slow
def test_wheel_works_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    found = where(tmp_path, pythonpath=str(site))
    for name in ("_C", "nanotron_fast", "nanotron_fast.kernels"):
        assert Path(found[name]).is_relative_to(site), name
    assert found["metadata"] == found["__version__"] == nanotron_fast.__version__
    assert found["commands"]["nanotron-fast"] == "nanotron_fast.__main__:main"
    assert str(site) not in (found["kernels"] or "")


def build_extensions(target: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Builds into a folder, from the objects that are there already."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(target)]
    env = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_build_within_make_says_nothing_of_its_jobs(tmp_path: Path) -> None:
    """Of which make hands none out here, whatever it says to its children."""
    flags = " -j2 --jobserver-auth=98,99"
    done = build_extensions(tmp_path, NANOTRON_FAST_CUDA="0", MAKEFLAGS=flags)
    assert done.returncode == 0, done.stderr
    assert "jobserver" not in (done.stdout + done.stderr).lower()


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(),
    reason="needs a CUDA compiler",
)
def test_cuda_sources_compile_where_there_is_a_compiler(tmp_path: Path) -> None:
    # One architecture: each takes as long. What a build compiles otherwise is .ci/run's to say.
    architectures = os.environ.get("NANOTRON_FAST_CUDA_ARCHS") or "90"
    done = build_extensions(
        tmp_path, NANOTRON_FAST_CUDA="1", NANOTRON_FAST_CUDA_ARCHS=architectures
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name.partition(".")[0] for path in tmp_path.rglob("*.so")}
    assert names == {"_C", "_cuda"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NANOTRON_FAST_CUDA": "1", "CUDA_HOME": "/nowhere"}, "there is no nvcc on PATH"),
        ({"NANOTRON_FAST_CUDA": "yes"}, "NANOTRON_FAST_CUDA=yes: set it to 0 or 1"),
    ],
)
def test_what_a_build_with_cuda_lacks_is_named(
    tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    done = build_extensions(tmp_path, **variables)
    assert done.returncode != 0
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_kernels_is_never_ours(tmp_path: Path) -> None:
    """transformers looks for a package `kernels`; finding our folder would mislead it."""
    assert str(ROOT) not in (where(tmp_path)["kernels"] or "")


def test_kernels_does_nothing_under_another_package_s_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = compile((ROOT / "kernels/__init__.py").read_text(), "kernels", "exec")
    monkeypatch.setattr("builtins.__import__", lambda *_: pytest.fail("it imports something"))
    names = {"__name__": "kernels"}
    exec(code, names)
    assert set(names) == {"__name__", "__doc__", "__builtins__"}


def test_version_has_one_source() -> None:
    assert version("nanotron_fast") == nanotron_fast.__version__
