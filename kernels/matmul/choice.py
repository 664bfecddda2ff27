"""Whether a fused product is faster than the vendor's product and our kernel: measured, and kept.

The environment variable NANOTRON_FAST_FUSED_MATMUL decides:

- ``auto`` (the default): the first use of a shape on a GPU times both, later ones keep the winner.
  Nothing is timed while a CUDA graph is captured or torch.compile traces: there a shape that was
  not met before takes the vendor's product. So does everything on the CPU;
- ``always`` and ``never``: no timing. Ranks and runs then round alike, which ``auto`` does not
  promise, since two machines may time differently.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from nanotron_fast.kernels.runtime import capture
from nanotron_fast.kernels.runtime.backend import constant_in_a_graph
from nanotron_fast.kernels.runtime.operators import on_device

ENVIRONMENT_VARIABLE = "NANOTRON_FAST_FUSED_MATMUL"
MODES = ("auto", "always", "never")

# More tokens than these only repeat the same work, and would take memory that training needs.
_MAX_TOKENS = 8192
_WARMUPS, _ROUNDS = 2, 7


class Key(NamedTuple):
    """What a decision is made for. `tokens` is a number that `tokens_bucket` gives."""

    kind: str
    tokens: int
    hidden: int
    out: int
    dtype: torch.dtype
    device: torch.device


# The vendor's product followed by our kernel, and then the fused kernel.
Candidates = tuple[Callable[[], object], Callable[[], object]]
_decisions: dict[Key, bool] = {}


# torch.compile keeps what it reads while it traces: the choice is made once per compiled graph.
@constant_in_a_graph
def requested_mode() -> str:
    """What NANOTRON_FAST_FUSED_MATMUL asks for. Raises ValueError for a value that is no mode."""
    mode = os.environ.get(ENVIRONMENT_VARIABLE, "") or "auto"
    if mode not in MODES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={mode}: choose {', '.join(MODES)}")
    return mode


@constant_in_a_graph
def decided(
    kind: str, tokens: int, hidden: int, out: int, dtype: torch.dtype, device: torch.device
) -> bool | None:
    """What was measured before of a Key's fields; None where nothing was.

    They come one by one, for torch.compile hands a constant function no NamedTuple.
    """
    return _decisions.get(Key(kind, tokens, hidden, out, dtype, device))


def tokens_bucket(tokens: int) -> int:
    """The power of two that stands for so many tokens where something is timed or tuned."""
    # By comparisons alone: torch.compile then keeps a number of tokens that varies variable.
    bucket = 16
    while bucket < tokens and bucket < _MAX_TOKENS:
        bucket *= 2
    return bucket


def _is_measured_on(device: torch.device) -> bool:
    return device.type == "cuda"


def _milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@torch.no_grad()
def _measure(make_candidates: Callable[[], Candidates]) -> bool:
    """True where the fused kernel's median is the lower one, False where memory is too short."""
    try:
        candidates = make_candidates()
        for run in candidates * _WARMUPS:
            run()
        rounds = [[_milliseconds(run) for run in candidates] for _ in range(_ROUNDS)]
    except torch.OutOfMemoryError:
        return False
    vendor, fused = (median(times) for times in zip(*rounds, strict=True))
    return fused < vendor


def choose(key: Key, make_candidates: Callable[[], Candidates]) -> bool:
    """Whether to take the fused kernel for this shape; see the module's docstring."""
    mode = requested_mode()
    if mode != "auto":
        return mode == "always"
    if not _is_measured_on(key.device):
        return False
    known = decided(key.kind, key.tokens, key.hidden, key.out, key.dtype, key.device)
    if known is not None:
        return known
    if torch.compiler.is_compiling() or capture.is_capturing(key.device):
        return False
    # Events are recorded on the current device: of another's work they would say nothing.
    with on_device(-1 if key.device.index is None else key.device.index):
        _decisions[key] = _measure(make_candidates)
    return _decisions[key]
