"""What a release is made of agrees with itself. `make wheel` builds one."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == nanotron_fast.__version__
    assert f"## [{nanotron_fast.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_only_the_job_that_publishes_may_sign_in() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert {name for name, job in jobs.items() if "permissions" in job} == {"publish"}
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    assert "refs/tags/" in jobs["publish"]["if"]
    archs = {each["arch"] for each in jobs["wheels"]["strategy"]["matrix"]["include"]}
    assert archs == set(re.findall(r"^manylinux-(\w+)-image", pyproject(), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_write_no_code_and_end(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    assert document["permissions"]["contents"] == "read"
    for job in document["jobs"].values():
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
