"""What a release is made of agrees with itself. `make wheel` builds one."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import nanotron_fast

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text()


def test_every_python_that_is_named_has_wheels() -> None:
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', pyproject())
    (build,) = re.findall(r'^build = "(.*)"$', pyproject(), re.MULTILINE)
    assert build.split() == [f"cp{each.replace('.', '')}-*" for each in named]
    assert f'requires-python = ">={named[0]}"' in pyproject()
    checks = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["check"]
    assert checks["strategy"]["matrix"]["python"] == named


def test_the_oldest_typer_that_is_allowed_is_tried() -> None:
    (oldest,) = re.findall(r'"typer>=([\d.]+),', pyproject())
    assert f'"typer=={oldest}.0"' in (ROOT / "tests" / "versions" / "__main__.py").read_text()


def checker() -> ModuleType:
    """.ci/check_release.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "check_release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_the_same_everywhere() -> None:
    assert checker().problems(ROOT) == []
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == nanotron_fast.__version__


def dated(version: str) -> str:
    return f"# Changelog\n\n## [{version}] - 2030-01-31\n\n## [0.0.1] - 2029-01-31\n"


@pytest.mark.parametrize(
    ("changed", "tag", "problem"),
    [
        ({}, "v9.8.0", None),
        ({}, "v9.8.1", "versions differ: the tag 9.8.1, nanotron_fast/version.py 9.8.0, "),
        ({}, "9.8.0", "the tag 9.8.0 does not begin with v"),
        ({"nanotron_fast/version.py": '__version__ = "9.9"\n'}, "v9.8.0", "versions differ: "),
        ({"CITATION.cff": "cff-version: 9.8.0\nversion: 9.7\n"}, "v9.8.0", "CITATION.cff 9.7"),
        ({"CITATION.cff": "cff-version: 9.8.0\n"}, "v9.8.0", "CITATION.cff names no version"),
        ({"CHANGELOG.md": dated("9.7.0")}, "v9.8.0", "CHANGELOG.md 9.7.0"),
        ({"CHANGELOG.md": dated("9.7.0")}, None, "CHANGELOG.md 9.7.0"),
        ({"CHANGELOG.md": "## [9.8.0] - Unreleased\n"}, "v9.8.0", "no date, but '- Unreleased'"),
        ({"CHANGELOG.md": "## [9.8.0] - Unreleased\n"}, None, None),
        ({"pyproject.toml": 'version = "9.8.0"\n'}, "v9.8.0", "pyproject.toml does not take"),
    ],
)
def test_a_release_that_does_not_agree_is_refused(
    changed: dict[str, str], tag: str | None, problem: str | None, tmp_path: Path
) -> None:
    files = {
        "nanotron_fast/version.py": '__version__ = "9.8.0"\n',
        "CITATION.cff": "cff-version: 1.2.0\nversion: 9.8.0\n",
        "CHANGELOG.md": dated("9.8.0"),
        "pyproject.toml": pyproject(),
        **changed,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci" / "check_release.py", tmp_path / ".ci")
    words = [tag] if tag is not None else []
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == (0 if problem is None else 1), done.stderr
    assert (problem or "") in done.stderr


def test_only_the_job_that_publishes_may_sign_in() -> None:
    """It waits for all the others, the checks of every change among them."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert {name for name, job in jobs.items() if "permissions" in job} == {"publish"}
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    assert "refs/tags/" in jobs["publish"]["if"]
    assert jobs["checks"]["uses"] == "./.github/workflows/ci.yml"
    (checked,) = (step["run"] for step in jobs["version"]["steps"] if "run" in step)
    assert checked.startswith("python .ci/check_release.py")
    archs = {each["arch"] for each in jobs["wheels"]["strategy"]["matrix"]["include"]}
    assert archs == set(re.findall(r"^manylinux-(\w+)-image", pyproject(), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_write_no_code_and_end(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    assert document["permissions"]["contents"] == "read"
    for job in document["jobs"].values():
        if "uses" in job:  # a workflow of ours, whose own jobs end
            assert ROOT / job["uses"] in WORKFLOWS
            assert "workflow_call" in yaml.safe_load((ROOT / job["uses"]).read_text())[True]
        else:
            assert job["timeout-minutes"] <= 180


@pytest.mark.parametrize(
    "path", [each for each in FORMS if each.name != "config.yml"], ids=lambda path: path.name
)
def test_every_form_asks_for_the_environment(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    required = [
        field["attributes"]["label"]
        for field in form["body"]
        if field["validations"]["required"] is True
    ]
    assert "What `nanotron-fast env` prints" in required


def test_images_are_built_from_what_a_build_needs() -> None:
    """.dockerignore lets in what the sdist has, file by file."""
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert all((ROOT / name).exists() for name in allowed)
    manifest = (ROOT / "MANIFEST.in").read_text()
    named = re.findall(r"^(?:graft|include) (.*)$", manifest, re.MULTILINE)
    needed = {word for words in named for word in words.split()}
    needed |= {"pyproject.toml", "setup.py", "README.md", "LICENSE", "nanotron_fast", "kernels"}
    assert needed <= allowed
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert stages[-1] == "converter"
