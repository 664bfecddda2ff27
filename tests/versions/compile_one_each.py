"""Compiles every kernel once, for sm_90: its first launch by the cases of tests/kernels/compiling.

python -m tests.versions.compile_one_each
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import tests.kernels.compiling
from tests.kernels.compiling import __main__ as compiling

ARCHITECTURE = 90


def main() -> int:
    launches: dict[compiling.Launch, None] = {}
    compiling._catch(launches, is_brief=True)
    unlaunched: list[str] = []
    (folder,) = map(Path, tests.kernels.compiling.__path__)
    for name in sorted(info.name for info in pkgutil.iter_modules([str(folder)])):
        if name == "__main__":
            continue
        module = importlib.import_module(f"tests.kernels.compiling.{name}")
        for case in module.CASES:
            case()
            missing = compiling._never_launched(module.FILES, launches)
            if not missing:
                break
        unlaunched += missing
    first = {(launch.module, launch.kernel): launch for launch in reversed(launches)}
    failures = len(unlaunched)
    for launch in first.values():
        try:
            compiling.compile_for(launch, ARCHITECTURE)
        except Exception as error:  # whatever this version of Triton raises is what we look for
            failures += 1
            print(f"FAILED {launch}\n  {type(error).__name__}: {error}")
    for kernel in unlaunched:
        print(f"FAILED no case launches {kernel}")
    print(f"{len(first)} kernels compiled, {failures} failures")
    return 1 if failures or not first else 0


if __name__ == "__main__":
    sys.exit(main())
