"""Operations on lists of DTensors: `shard_ranks` holds the cases, of two ranks."""

from __future__ import annotations

from tests.parallel.ranks import run_ranks


def test_lists_of_dtensors_over_two_ranks() -> None:
    run_ranks("tests.kernels.shard_ranks", 2)
