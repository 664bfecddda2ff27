"""The drop-in by one line: `import nanotron_fast.auto` before anything of Nanotron is imported.

The same as `nanotron_fast.enable()`. NANOTRON_FAST_OPS names the operations, with commas between
them; without it they are all on. `nanotron_fast.disable()` takes everything out again.
"""

from __future__ import annotations

from nanotron_fast.extras import require

require("kernels", "nanotron_fast.auto")

from nanotron_fast.patch.nanotron.registry import enable, requested_ops  # noqa: E402

enable(requested_ops())
