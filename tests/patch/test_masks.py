"""Masks that are taken for full, and what is asked of the device about them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nanotron_fast.patch.nanotron.replacements import masks
from nanotron_fast.patch.nanotron.targets import DropInOptions


@pytest.mark.parametrize("is_capturing", [False, True])
def test_no_event_is_asked_while_a_graph_is_captured(monkeypatch, is_capturing: bool) -> None:
    """CUDA allows no question about an event then, not about one that lies before the capture."""
    assumed, asked = masks._Assumed(), []

    class Event:
        def query(self) -> bool:
            asked.append(self)
            return False

    assumed.pending = (torch.zeros((), dtype=torch.int64), Event(), 4)
    monkeypatch.setattr(masks, "_assumed", assumed)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    mask = SimpleNamespace(is_cuda=True, is_inference=lambda: False)
    assert masks.document_starts(mask, DropInOptions(assume_full_masks=True)) is None
    assert len(asked) == (0 if is_capturing else 1)
    assert assumed.pending is not None
