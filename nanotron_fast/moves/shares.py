"""Which of several processes writes which file: balanced by bytes, one folder's files together."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

# Shares whose largest is this much above their mean are good enough to keep folders whole.
_GOOD_BALANCE = 1.02
# Folders are cut into their files where they are larger than these parts of a mean share.
_LARGEST_FOLDERS = (float("inf"), 1.0, 0.5, 0.25, 0.125, 0.0625, 0.0)


def owners_of(files: Sequence[tuple[str, int]], num_shares: int) -> list[int]:
    """The share of each file, given its path and its size in bytes.

    The shards of one parameter share a folder and are made from the same bytes, so they stay
    together as long as shares of whole folders balance; the largest folders are cut into their
    files where they do not. Everybody who knows the files finds the same shares.
    """
    total = sum(size for _, size in files)
    best: list[int] = []
    least = None
    for part in _LARGEST_FOLDERS:
        owners, most = _deal(_units(files, part * total / num_shares), len(files), num_shares)
        if least is None or most < least:
            best, least = owners, most
        if least * num_shares <= _GOOD_BALANCE * total:
            break
    return best


def _units(files: Sequence[tuple[str, int]], limit_bytes: float) -> list[tuple[int, list[int]]]:
    """What is dealt out as one: size, and the files by number. No folder is over the limit."""
    folders: dict[str, list[int]] = {}
    for number, (path, _) in enumerate(files):
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder or name, []).append(number)
    units: list[tuple[int, list[int]]] = []
    for numbers in folders.values():
        size = sum(files[number][1] for number in numbers)
        if size <= limit_bytes:
            units.append((size, numbers))
        else:
            units += [(files[number][1], [number]) for number in numbers]
    return units


def _deal(
    units: Sequence[tuple[int, list[int]]], num_files: int, num_shares: int
) -> tuple[list[int], int]:
    """The share of each file, and the bytes of the largest share: the largest unit first, each to
    the share that has the least."""
    owners = [0] * num_files
    loads = [(0, share) for share in range(num_shares)]
    most = 0
    for size, numbers in sorted(units, key=lambda unit: (-unit[0], unit[1][0])):
        load, share = loads[0]
        heapq.heapreplace(loads, (load + size, share))
        most = max(most, load + size)
        for number in numbers:
            owners[number] = share
    return owners, most
