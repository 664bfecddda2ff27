"""Whether the packages that the installed Nanotron needs are there, in versions that it can use.

Its own metadata is held to, and so is what that leaves out: main asks for any datasets and any
transformers, but imports from both what their version 5 has no more.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from nanotron_fast.errors import ConfigError

# What every model of either version imports: name for Python -> name for pip.
_IMPORTED = {
    "dacite": "dacite",
    "numpy": "numpy",
    "packaging": "packaging",
    "safetensors": "safetensors",
    "torch": "torch",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
}
_IMPORTED_BY_MAIN = {
    "datasets": "datasets",
    "einops": "einops",
    "psutil": "psutil",
    "transformers": "transformers",
}
# A requirement of main -> why it has it.
_LIMITS_OF_MAIN = {
    "datasets<5": "it imports xPath, which 5 has no more",
    "transformers<5": "it imports from trainer_pt_utils what 5 has no more",
    "numpy<2": "it says so itself",
    "pyarrow<22": "the last that takes a numpy before 2",
}


def check_requirements() -> None:
    """Raises ConfigError that names every package that is missing or of another version, at once.

    Where Nanotron itself is missing, nothing is said: importing it says that better.
    """
    spec = importlib.util.find_spec("nanotron")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    is_main = (folder / "models" / "qwen.py").is_file()
    problems = dict(_problems(is_main))
    if problems:
        what = "; ".join(problems.values())
        wanted = " ".join(f"'{each}'" if set(each) & set("<>!=~") else each for each in problems)
        name = "main" if is_main else "0.4"
        raise ConfigError(
            f"Nanotron {name} ({folder}) does not fit what is installed: {what}. "
            f"pip install {wanted}"
        )


def _problems(is_main: bool) -> Iterator[tuple[str, str]]:
    """For each problem, what to give pip and what is wrong."""
    imported = _IMPORTED | (_IMPORTED_BY_MAIN if is_main else {})
    limits = {Requirement(each): why for each, why in _LIMITS_OF_MAIN.items()} if is_main else {}
    named = {canonicalize_name(each.name) for each in limits}
    for requirement in _own_requirements():
        if canonicalize_name(requirement.name) not in named:
            limits[requirement] = "its own metadata says so"
    bounds = {canonicalize_name(each.name): each for each in limits}
    for name, package in imported.items():
        if importlib.util.find_spec(name) is None:
            bound = bounds.get(canonicalize_name(package))
            wanted = package if bound is None else f"{package}{bound.specifier}"
            yield wanted, f"{package} is not installed"
    for requirement, why in limits.items():
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # what is imported is looked for above
        if not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            yield wanted, f"{requirement.name} {found}, and it needs {wanted} ({why})"


def _own_requirements() -> Iterator[Requirement]:
    """What its installed metadata asks for without extras; nothing where it is a mere folder."""
    try:
        lines = metadata.requires("nanotron") or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue  # pip would not take it either
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement
