"""What the other tests rely on: memory that nobody has written is not plausible."""

from __future__ import annotations

import torch

from tests.kernels.poisoning import poison_allocations


def assert_poisoned(device: torch.device) -> None:
    x = torch.zeros(3, 5, device=device)
    for tensor in (
        torch.empty(7, device=device),
        torch.empty_like(x),
        x.new_empty(4, 4),
        x.new_empty((2, 2), dtype=torch.bfloat16),
    ):
        assert tensor.isnan().all()
    assert (x.new_empty(3, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.zeros(3, device=device).isnan().any()


def test_memory_is_poisoned(device) -> None:
    assert_poisoned(device)


def test_allocations_are_poisoned_without_deterministic_algorithms(monkeypatch) -> None:
    torch.use_deterministic_algorithms(False)
    poison_allocations(monkeypatch)
    assert_poisoned(torch.device("cpu"))
    assert torch.empty(0).numel() == 0
