"""What the kernels are to reach on a GPU, and what of it a run's rows have reached.

Shares are of the run's own ceilings, but for MFU, which is of the vendor's peak. A figure that the
run did not come to is told as such: it is not reached. Attention and the linear cross entropy have
a target in each shape that it came to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gpu.jobs import BESIDE
from benchmarks.gpu.rows import Row
from benchmarks.training.variants import OURS

# Operation, shape, phase, the least share of the copy on the device.
_SHARES = (
    ("rms_norm", "32768x4096", "forward", 0.95),
    ("rms_norm", "32768x8192", "forward", 0.95),
    ("rms_norm", "32768x4096", "backward", 0.85),
    ("rms_norm", "32768x8192", "backward", 0.85),
    ("glu", "8192x16384", "forward", 0.95),
    ("glu", "8192x16384", "backward", 0.92),
    ("rope_qkv", "8192 tokens, 32+2x8", "forward", 0.88),
    ("adamw", "", "forward", 0.9),
    ("accumulate", "", "forward", 0.9),
    ("pack", "q, k, v", "forward", 0.9),
)
# Of the cross entropy at this size on an H100, forward and backward.
_LOSS, _LOSS_MS = "8192x131072", 2.4
_OVER_PRODUCTS = 1.12
# Two times that are the same differ by so much.
_NOISE = 1.02
_MFU = (("1.1B", 0.5), ("3B", 0.55))


@dataclass(frozen=True)
class Target:
    """A bound, and the figure that is held to it; None where the run has none."""

    what: str
    found: float | None
    bound: float
    is_least: bool

    @property
    def is_reached(self) -> bool:
        if self.found is None:
            return False
        return self.found >= self.bound if self.is_least else self.found <= self.bound

    def __str__(self) -> str:
        mark = "reached" if self.is_reached else "not measured" if self.found is None else "MISSED"
        found = "" if self.found is None else f"{self.found:.3g}"
        sense = "at least" if self.is_least else "at most"
        return f"  {mark:14} {self.what:64} {found:>8}  {sense} {self.bound:g}"


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """All of them, by the rows of a run."""
    ratios = [row for row in rows if row["kind"] == "ratio" and row["ok"]]
    steps = [row for row in rows if row["kind"] == "step" and row["ok"]]

    def ms(operation: str, shape: str, phase: str) -> dict[str, float]:
        wanted = (operation, shape, phase)
        mine = [r for r in ratios if (r["operation"], r["shape"], r["phase"]) == wanted]
        return {row["variant"]: row["p50_ms"] for row in mine}

    def kinds(operation: str) -> list[tuple[str, str]]:
        mine = [row for row in ratios if row["operation"] == operation]
        return list(dict.fromkeys((row["shape"], row["phase"]) for row in mine))

    for operation, shape, phase, least in _SHARES:
        found = None
        for row in ratios:
            is_it = (row["operation"], row["variant"], row["phase"]) == (operation, "ours", phase)
            if is_it and row["shape"].startswith(shape) and "residual" not in row["shape"]:
                found = row.get("fraction_of_ceiling")
                if operation == "pack" and row["path"] != "cuda":
                    found = None  # it is that of the packer in CUDA which is asked for
        yield Target(f"{operation} {shape} {phase}, of the copy", found, least, True)
    both = ms("cross_entropy", _LOSS, "forward + backward")
    yield Target(f"cross_entropy {_LOSS}, ms on an H100", both.get("ours"), _LOSS_MS, False)
    for shape, phase in kinds("linear_cross_entropy") or [("", "forward + backward")]:
        times = ms("linear_cross_entropy", shape, phase)
        bare = times.get("bare products")
        ours = times["ours"] / bare if bare and "ours" in times else None
        yield Target(f"linear_cross_entropy {shape}, of its products", ours, _OVER_PRODUCTS, False)
    for shape, phase in kinds("attention") or [("", "forward")]:
        times = ms("attention", shape, phase)
        auto = times.get("ours, auto")
        libraries = [each for name, each in times.items() if not name.startswith("ours")]
        over = auto / min(libraries) if auto and libraries else None
        what = f"attention {shape} {phase}, auto over the best library"
        yield Target(what, over, _NOISE, False)
    for model, least in _MFU:
        mine = [r for r in steps if (r["operation"], r["variant"]) == (model, OURS)]
        mfu = [row["mfu"] for row in mine if "mfu" in row]
        yield Target(f"{model}, MFU of ours", mfu[0] if mfu else None, least, True)
    for setting in BESIDE:
        mine = [row for row in steps if row["operation"] == setting]
        speeds = {row["variant"]: row["tokens_per_s"] for row in mine}
        others = [speed for name, speed in speeds.items() if name != OURS]
        over = speeds[OURS] / max(others) if OURS in speeds and others else None
        yield Target(f"{setting}, ours over the fastest other", over, 1.0, True)
