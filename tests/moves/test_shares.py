"""Sharing files between processes: every file once, as even as whole files can be."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanotron_fast.moves.shares import owners_of

PATHS = st.builds("{}/{}".format, st.integers(0, 6), st.integers(0, 99))


def loads_of(files: list[tuple[str, int]], num_shares: int) -> list[int]:
    loads = [0] * num_shares
    for (_, size), owner in zip(files, owners_of(files, num_shares), strict=True):
        loads[owner] += size
    return loads


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(PATHS, st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 70))
def test_no_share_is_larger_than_the_mean_and_one_file_or_the_tolerance(
    sizes: dict[str, int], num_shares: int
) -> None:
    files = list(sizes.items())
    loads = loads_of(files, num_shares)
    assert sum(loads) == sum(sizes.values())
    mean = sum(loads) / num_shares
    assert max(loads) <= max(1.02 * mean, mean + max(sizes.values()))


def test_folders_stay_whole_where_that_is_even() -> None:
    files = [(f"layer-{layer}/rank-{rank}", 10) for layer in range(8) for rank in range(4)]
    owners = owners_of(files, 4)
    for layer in range(8):
        assert len(set(owners[4 * layer : 4 * layer + 4])) == 1


@pytest.mark.parametrize("num_shares", [2, 3, 5, 8, 16])
def test_folders_are_cut_where_they_are_too_coarse(num_shares: int) -> None:
    files = [(f"big/rank-{rank}", 10) for rank in range(480)]
    files += [(f"layer-{layer}/weight", 1) for layer in range(5)]
    loads = loads_of(files, num_shares)
    assert max(loads) <= 1.02 * sum(loads) / num_shares


def test_only_the_folders_that_are_too_large_are_cut() -> None:
    files = [(f"experts/rank-{rank}", 100) for rank in range(4)]
    files += [(f"layer-{layer}/rank-{rank}", 5) for layer in range(40) for rank in range(2)]
    owners = owners_of(files, 4)
    assert len(set(owners[:4])) == 4
    for layer in range(40):
        assert owners[4 + 2 * layer] == owners[5 + 2 * layer]


def test_more_processes_than_files_leave_some_without() -> None:
    assert sorted(loads_of([("a", 3), ("b", 5)], 4)) == [0, 0, 3, 5]
