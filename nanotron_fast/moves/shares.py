"""Which of several processes writes what: balanced by bytes, one folder's files together.

Whole files are dealt out where that is even enough. Where it is not, the files that fit nowhere
whole are cut: what each share lacks to the mean is filled with bytes of theirs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

# Files are cut at multiples of this: of a page of any kernel's, so that no page of a file belongs
# to two machines. NFS writes whole pages.
CUT_MULTIPLE_BYTES = 1 << 20
# Smaller files stay whole.
CUT_OVER_BYTES = 64 << 20
# Shares whose largest is this much above their mean are good enough to keep folders whole.
_GOOD_BALANCE = 1.02
# Shares are filled with cut files up to this, so that what they lack need not be met to the byte.
_FILLED_BALANCE = 1.01
# Folders are cut into their files where they are larger than these parts of a mean share.
_LARGEST_FOLDERS = (float("inf"), 1.0, 0.5, 0.25, 0.125, 0.0625, 0.0)


class Part(NamedTuple):
    """The bytes of a file, by its number, from `begin_bytes` up to `end_bytes`."""

    file: int
    begin_bytes: int
    end_bytes: int


def parts_of(
    files: Sequence[tuple[str, int]],
    num_shares: int,
    *,
    can_be_cut: Callable[[int], bool] | None = None,
) -> list[list[Part]]:
    """What each share has, in the order of the files; of one file it has one part at most.

    Everybody who knows the files finds the same shares.

    Args:
        files: path and size in bytes of each.
        num_shares: at least 1.
        can_be_cut: whether a file, by its number, may be cut at multiples of `CUT_MULTIPLE_BYTES`.
            Without it all files are whole.
    """
    owners = owners_of(files, num_shares)
    loads = [0] * num_shares
    for owner, (_, size) in zip(owners, files, strict=True):
        loads[owner] += size
    if can_be_cut is not None and max(loads) * num_shares > _GOOD_BALANCE * sum(loads):
        cut = _deal_with_cuts(files, num_shares, can_be_cut)
        if max(map(_num_bytes, cut)) < max(loads):
            return cut
    shares: list[list[Part]] = [[] for _ in range(num_shares)]
    for number, owner in enumerate(owners):
        shares[owner].append(Part(number, 0, files[number][1]))
    return shares


def owners_of(files: Sequence[tuple[str, int]], num_shares: int) -> list[int]:
    """The share of each file as a whole, given its path and its size in bytes.

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
    units: list[tuple[int, list[int]]] = []
    for numbers in _folders(files):
        size = sum(files[number][1] for number in numbers)
        if size <= limit_bytes:
            units.append((size, numbers))
        else:
            units += [(files[number][1], [number]) for number in numbers]
    return units


def _folders(files: Sequence[tuple[str, int]]) -> list[list[int]]:
    """The files of each folder, by number."""
    folders: dict[str, list[int]] = {}
    for number, (path, _) in enumerate(files):
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder or name, []).append(number)
    return list(folders.values())


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


def _deal_with_cuts(
    files: Sequence[tuple[str, int]], num_shares: int, can_be_cut: Callable[[int], bool]
) -> list[list[Part]]:
    """The largest folder first, each to the share that has the least; where it does not fit, its
    files one by one; and those that do not fit either are cut, to fill what is left."""
    mean = sum(size for _, size in files) / num_shares
    shares: list[list[Part]] = [[] for _ in range(num_shares)]
    loads = [(0, share) for share in range(num_shares)]
    pending = [(-sum(files[each][1] for each in folder), folder) for folder in _folders(files)]
    heapq.heapify(pending)
    left: list[int] = []
    while pending:
        order, numbers = heapq.heappop(pending)
        size = -order
        load, share = loads[0]
        fits = load + size <= _GOOD_BALANCE * mean
        if not fits and len(numbers) > 1:
            for number in numbers:
                heapq.heappush(pending, (-files[number][1], [number]))
        elif not fits and size > CUT_OVER_BYTES and can_be_cut(numbers[0]):
            left += numbers
        else:
            heapq.heapreplace(loads, (load + size, share))
            shares[share] += [Part(number, 0, files[number][1]) for number in numbers]
    most = math.ceil(_FILLED_BALANCE * mean) + CUT_MULTIPLE_BYTES
    _fill(shares, loads, [(number, files[number][1]) for number in left], most)
    for parts in shares:
        parts.sort()
    return shares


def _fill(
    shares: Sequence[list[Part]],
    loads: Sequence[tuple[int, int]],
    files: Sequence[tuple[int, int]],
    most_bytes: int,
) -> None:
    """Fills shares with files, one after another and the emptiest share first.

    Args:
        shares: what is filled.
        loads: (bytes, number of the share).
        files: (number, size in bytes).
        most_bytes: how far shares are filled. It is more than the mean share by the multiple at
            which files are cut, so that all of them find room.
    """
    emptiest = iter(sorted(loads))
    share, room = 0, 0
    for number, size in files:
        at = 0
        while at < size:
            take = min(size - at, room - room % CUT_MULTIPLE_BYTES)
            if take <= 0:
                load, share = next(emptiest)
                room = most_bytes - load
                continue
            shares[share].append(Part(number, at, at + take))
            room -= take
            at += take


def _num_bytes(parts: Sequence[Part]) -> int:
    return sum(part.end_bytes - part.begin_bytes for part in parts)
