"""The floor of a conversion: the bytes of a folder through two threads into as many files as asked.

    python benchmarks/plain_loop.py SRC OUT NUM_FILES

Each thread reads a share of the bytes in order, 128 KiB at a time, and writes each block where it
belongs. It looks into no header and moves no row: what a converter takes longer is its own cost.
"""

from __future__ import annotations

import os
import sys
import threading
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

BLOCK_BYTES = 128 << 10
NUM_THREADS = 2


def copy(source: Path, out: Path, num_files: int) -> None:
    """Spreads the files of `source`, one behind the other, over new files of equal size."""
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    starts = [0, *accumulate(path.stat().st_size for path in paths)]
    total = starts[-1]
    file_bytes = _up_to_blocks(-(-total // num_files))
    out.mkdir(parents=True)
    inputs = [os.open(path, os.O_RDONLY) for path in paths]
    outputs = [
        os.open(out / f"{number}.bin", os.O_WRONLY | os.O_CREAT)
        for number in range(-(-total // file_bytes))
    ]

    def work(begin: int, end: int) -> None:
        block = memoryview(bytearray(BLOCK_BYTES))
        at = begin
        while at < end:
            number = bisect_right(starts, at) - 1
            file, offset = divmod(at, file_bytes)
            size = min(BLOCK_BYTES - at % BLOCK_BYTES, end - at, starts[number + 1] - at)
            got = os.preadv(inputs[number], [block[:size]], at - starts[number])
            put = os.pwrite(outputs[file], block[:got], offset)
            if not put:
                raise OSError(f"{paths[number]}: no byte could be copied at {at}")
            at += put

    share = _up_to_blocks(-(-total // NUM_THREADS))
    threads = [
        threading.Thread(target=work, args=(begin, min(total, begin + share)))
        for begin in range(0, total, share)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _up_to_blocks(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


if __name__ == "__main__":
    copy(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
