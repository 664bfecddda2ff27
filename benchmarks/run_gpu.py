"""Everything worth knowing of a GPU in one command: see benchmarks/gpu. `make gpu` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

# The repository comes last: before the installed packages its kernels/ would shadow another one.
ROOT = Path(__file__).resolve().parents[1]
sys.path = [*(path for path in sys.path if path != str(ROOT / "benchmarks")), str(ROOT)]

from benchmarks.gpu.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
