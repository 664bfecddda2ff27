"""Times configurations of the kernels beside their rules: see benchmarks/gpu/sweep.py."""

from __future__ import annotations

import sys
from pathlib import Path

# The repository comes last: before the installed packages its kernels/ would shadow another one.
ROOT = Path(__file__).resolve().parents[1]
sys.path = [*(path for path in sys.path if path != str(ROOT / "benchmarks")), str(ROOT)]

from benchmarks.gpu.sweep import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
