"""Holds a release to itself: the tag, the version, CITATION.cff and CHANGELOG.md say the same.

    python .ci/check_release.py [TAG]

A tag is v and the version, which CHANGELOG.md dates. Without one the others are compared alone.
Exits with 1 where they differ, and says how. Python's own library is enough.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where a version is written down: in the file, what stands around the first.
PLACES = {
    "nanotron_fast/version.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (\S+)$",
    "CHANGELOG.md": r"^## \[(.+?)\]",
}


def problems(root: Path, tag: str | None = None) -> list[str]:
    """What keeps the tree from being released, under a tag if there is one; empty: nothing."""
    found = {name: _first(root / name, pattern) for name, pattern in PLACES.items()}
    # Which is where a build takes it from, whatever is written there.
    if not re.search(
        r'^version = \{ attr = "nanotron_fast\.version\.__version__" \}$',
        (root / "pyproject.toml").read_text(encoding="utf-8"),
        re.MULTILINE,
    ):
        return ["pyproject.toml does not take the version from nanotron_fast/version.py"]
    said = [f"{name} names no version" for name, version in found.items() if version is None]
    if tag is not None:
        found = {"the tag": tag.removeprefix("v") if tag.startswith("v") else tag, **found}
        if not tag.startswith("v"):
            said.append(f"the tag {tag} does not begin with v")
        heading = _first(root / "CHANGELOG.md", r"^## \[.+?\](.*)$") or ""
        if not re.fullmatch(r" - \d{4}-\d{2}-\d{2}", heading):
            said.append(f"CHANGELOG.md gives the newest version no date, but {heading.strip()!r}")
    if len(set(found.values())) > 1:
        said.append(f"versions differ: {', '.join(f'{name} {v}' for name, v in found.items())}")
    return said


def _first(path: Path, pattern: str) -> str | None:
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match is not None else None


def main() -> int:
    said = problems(ROOT, *sys.argv[1:2])
    for each in said:
        print(f"error: {each}", file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
