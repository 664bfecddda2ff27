"""What the tests of `parallel` take from the benchmarks: a counter of products and copies."""

from __future__ import annotations

import sys
from pathlib import Path

# The repository comes last: before the installed packages its kernels/ would shadow another one.
ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
