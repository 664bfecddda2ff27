"""Lists of tensors for the optimizer's operations, with guards around each."""

from __future__ import annotations

import math

import torch

# One element, nothing, a matrix, one less and one more than a chunk, several chunks.
SHAPES = [(1,), (0, 4), (3, 40), (2047,), (2049,), (3, 2048), (7, 11)]
CANARY = 7.0


def make(dtypes, device, shapes=SHAPES, offset=0):
    """Tensors that lie in one buffer each, at `offset`, with guards that nobody may write."""
    buffers, tensors = [], []
    for place, shape in enumerate(shapes):
        numel = math.prod(shape)
        buffer = torch.full((numel + offset + 64,), CANARY, device=device)
        buffer = buffer.to(dtypes[place % len(dtypes)])
        tensor = buffer[offset : offset + numel].view(shape)
        tensor.copy_(torch.randn(shape, device=device))
        buffers.append((buffer, offset, numel))
        tensors.append(tensor)
    return tensors, buffers


def assert_guards(*many):
    for buffers in many:
        for buffer, offset, numel in buffers:
            assert (buffer[:offset] == CANARY).all()
            assert (buffer[offset + numel :] == CANARY).all()
