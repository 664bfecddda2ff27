"""Sharing files between processes: every file once, as even as whole files can be."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanotron_fast.moves import shares
from nanotron_fast.moves.shares import Part, owners_of, parts_of
from tests.plans import small_cuts

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


def sizes_of(dealt: list[list[Part]]) -> list[int]:
    return [sum(part.end_bytes - part.begin_bytes for part in parts) for parts in dealt]


def ends_of(dealt: list[list[Part]], number: int) -> list[tuple[int, int]]:
    """The parts of one file, in the order of their bytes."""
    return sorted(part[1:] for parts in dealt for part in parts if part.file == number)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(PATHS, st.integers(1, 1000), min_size=1, max_size=40),
    st.integers(1, 70),
    st.integers(1, 16),
    st.sets(st.integers(0, 39)),
)
def test_cut_files_fill_the_shares(
    sizes: dict[str, int], num_shares: int, multiple: int, whole: set[int]
) -> None:
    files = list(sizes.items())
    with small_cuts(multiple):
        dealt = parts_of(files, num_shares, can_be_cut=lambda number: number not in whole)
    for number, (_, size) in enumerate(files):
        ends = ends_of(dealt, number)
        assert [begin for begin, _ in ends] == [0, *(end for _, end in ends)][:-1]
        assert ends[-1][1] == size
        assert all(end % multiple == 0 for _, end in ends[:-1])
        assert len(ends) == 1 or number not in whole
    for parts in dealt:
        assert len({part.file for part in parts}) == len(parts)
        assert parts == sorted(parts)
    mean = sum(sizes.values()) / num_shares
    if not whole:
        assert max(sizes_of(dealt)) <= max(1.02 * mean, 1.01 * mean + multiple + 1)
    assert max(sizes_of(dealt)) <= max(loads_of(files, num_shares))


def test_files_are_cut_only_where_whole_ones_are_uneven() -> None:
    files = [(f"layer-{layer}/rank-{rank}", 100) for layer in range(8) for rank in range(4)]
    with small_cuts():
        dealt = parts_of(files, 8, can_be_cut=lambda number: True)
    assert all(part.begin_bytes == 0 and part.end_bytes == 100 for each in dealt for part in each)
    assert [[part.file for part in parts] for parts in dealt] == [
        list(range(4 * layer, 4 * layer + 4)) for layer in range(8)
    ]


def test_only_the_files_that_fit_nowhere_are_cut() -> None:
    files = [(f"experts-{layer}/rank-0", 1500) for layer in range(4)]
    files += [(f"layer-{layer}/rank-{rank}", 10) for layer in range(50) for rank in range(2)]
    with small_cuts():
        dealt = parts_of(files, 3, can_be_cut=lambda number: True)
    assert max(sizes_of(dealt)) <= 1.02 * 7000 / 3
    cut = [number for number in range(len(files)) if len(ends_of(dealt, number)) > 1]
    assert cut == [3]
    for layer in range(50):
        owners = {
            n
            for n, parts in enumerate(dealt)
            for part in parts
            if part.file in (4 + 2 * layer, 5 + 2 * layer)
        }
        assert len(owners) == 1


def test_small_files_are_not_cut() -> None:
    size = shares.CUT_OVER_BYTES
    files = [(f"layer/rank-{rank}", size) for rank in range(3)]
    dealt = parts_of(files, 2, can_be_cut=lambda number: True)
    assert sorted(sizes_of(dealt)) == [size, 2 * size]
    files = [(path, size + 1) for path, size in files]
    sizes = sizes_of(parts_of(files, 2, can_be_cut=lambda number: True))
    assert max(sizes) <= 1.02 * sum(sizes) / 2


@pytest.mark.parametrize("num_shares", range(1, 65))
def test_experts_of_two_sizes_balance(num_shares: int) -> None:
    """As in a mixture of experts of 671 billion parameters: single files of 15 GB and of 7.5."""
    files = [
        (f"layer-{layer}/{name}/rank-{rank}", size)
        for layer in range(58)
        for name, size in (("up", 15_032_385_536), ("down", 7_516_192_768), ("attn", 46_000_000))
        for rank in range(1)
    ]
    dealt = parts_of(files, num_shares, can_be_cut=lambda number: True)
    sizes = sizes_of(dealt)
    assert max(sizes) * num_shares <= 1.02 * sum(sizes)
