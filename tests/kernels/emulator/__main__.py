"""The command of `tests.kernels.emulator`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels import emulator

ROOT = Path(__file__).parents[3]
# What launches kernels; the others ask how they are launched, or need a GPU.
FILES = (
    "accesses",
    "attention",
    "compiled_steps",
    "configurations",
    "cross_entropy",
    "embedding",
    "emulator",
    "emulator_ptx",
    "glu",
    "grad_norm",
    "linear_cross_entropy",
    "loss_parallel",
    "matmul",
    "operations",
    "optimizer",
    "pack",
    "pack_random",
    "rms_norm",
    "rope",
    "rope_apart",
    "rope_normed",
    "shards",
    "sinks",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.emulator",
        description="Run tests of kernels, compiled, without a GPU.",
        allow_abbrev=False,  # others are options of pytest
    )
    parser.add_argument("--arch", type=int, choices=(80, 90), default=90)
    parser.add_argument(
        "--seed", type=int, default=0, help="another order of blocks and warps for each"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="say what each kernel's accesses to memory take, beside the least that they could",
    )
    options, given = parser.parse_known_args()
    # What names no file is an option of pytest, or its value.
    if not any((ROOT / each.split("::")[0]).exists() for each in given):
        given += [f"tests/kernels/test_{name}.py" for name in FILES]
    folder = ROOT / "build" / "emulator"
    try:
        library = emulator.build(folder)
    except ImportError as error:
        parser.error(f"Triton is not installed: {error}")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        parser.error(f"the emulator is not built, CXX names another compiler: {error}")
    run, changes = emulator.command(library, *given)
    changes |= {"EMULATOR_ARCH": str(options.arch), "EMULATOR_SEED": str(options.seed)}
    if options.profile:
        profile = folder / "profile.jsonl"
        profile.write_text("")
        changes["EMULATOR_PROFILE"] = str(profile)
    os.chdir(ROOT)
    os.execve(sys.executable, run, {**os.environ, **changes})


if __name__ == "__main__":
    main()
