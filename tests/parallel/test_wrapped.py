"""Our operations in a user's own model under DDP and FSDP2, against plain torch on one rank."""

from __future__ import annotations

from tests.parallel.ranks import run_ranks


def test_like_plain_torch_in_torchs_wrappers() -> None:
    run_ranks("tests.parallel.wrapped_ranks", 2)
