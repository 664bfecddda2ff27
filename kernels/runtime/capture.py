"""CUDA graphs: whether one is captured, and the refusal of what it could not replay.

A capture records launches and does not run them. What a launch needs beside its tensors (tables on
the device, the block sizes that measure fastest) must be there before it: a replay would copy from
memory that was long since given to others, and a launch that is recorded cannot be timed. And it
must stay there.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
# What graphs read of what is remembered, by identity.
_kept: dict[int, Any] = {}


def is_capturing(device: torch.device) -> bool:
    """Whether a graph records what is launched on the current stream.

    Never on a CPU, nor while torch.compile traces, which launches nothing.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_if_capturing(device: torch.device, what: str) -> None:
    """Raises RuntimeError where a graph is captured.

    Args:
        device: what would be launched on.
        what: is missing, as the end of "a CUDA graph captures ...".
    """
    if is_capturing(device):
        raise RuntimeError(f"a CUDA graph captures {what}: run it once before, then capture it")


def keep(remembered: _T, device: torch.device) -> _T:
    """What an operation remembers, as it is: for good where a graph that is captured will read it.

    Without that its memory would be given to others when it is forgotten, and replays read on.
    """
    if is_capturing(device):
        _kept[id(remembered)] = remembered
    return remembered
