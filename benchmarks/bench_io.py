"""Times the ways of reading and writing beside `cp -r`, the source larger than the memory allowed.

Every run is in a control group whose memory, page cache included, is limited; where none can be
made, nothing is limited and the output says so (RLIMIT_AS does not count the page cache). The
source is dropped from the page cache first. Another file is read in the group before, and how much
of it is still there afterwards shows what was pushed out. Each round runs each variant once; what
counts is the ratio to `cp -r && sync` in the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import models
from bench_convert import ENVIRONMENT, OURS, environment

import nanotron_fast as nf

# Enters a control group and becomes a command.
_CHILD = (
    "import os, sys\n"
    "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
    "os.execvp(sys.argv[2], sys.argv[2:])"
)
_READ = "import sys;f=open(sys.argv[1],'rb',0)\nwhile f.read(1<<20):pass"
_GROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited(limit_bytes: int) -> Iterator[Path | None]:
    """A control group with that much memory; None where this process may not make one."""
    for top, name in ((_GROUPS, "memory.max"), (_GROUPS / "memory", "memory.limit_in_bytes")):
        if not (top / "cgroup.procs").exists():
            continue
        group = top / f"nanotron_fast-bench-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(limit_bytes))
        except OSError:
            group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


def run(command: list[str], group: Path | None) -> None:
    words = [sys.executable, "-c", _CHILD, os.fspath(group / "cgroup.procs"), *command]
    subprocess.run(
        words if group else command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT
    )


def drop(path: Path) -> None:
    """Drops files from the page cache."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def resident_share(path: Path) -> float:
    """Of the pages of a file, those in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(each & 1 for each in pages) / len(pages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="tinyllama-1.1b", choices=[*models.SHAPES])
    parser.add_argument("--memory", default="800MB", help="what a run may take")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--save", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    from nanotron_fast.units import parse_size

    limit = parse_size(args.memory, "--memory")
    with (
        tempfile.TemporaryDirectory(dir=args.directory, prefix="nanotron_fast-bench-") as folder,
        limited(limit) as group,
    ):
        work = Path(folder)
        if group is None:
            print("no control group can be made here: memory is not limited")
        num_bytes = models.make_model(work / "hf", args.shape)
        other = work / "other"
        other.write_bytes(os.urandom(limit // 4))
        os.sync()
        convert = [*OURS, "convert", str(work / "hf"), str(work / "out"), "--fsync", "--quiet"]
        variants = {
            "cp -r && sync": ["sh", "-c", f"cp -r {work}/hf {work}/out && sync {work}/out/*"],
            **{f"--io {io}": [*convert, "--io", io] for io in ("buffered", "direct", "dontcache")},
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        kept: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(args.rounds):
            for name, command in variants.items():
                shutil.rmtree(work / "out", ignore_errors=True)
                os.sync()
                drop(work / "hf")
                drop(other)
                run([sys.executable, "-c", _READ, str(other)], group)
                started = time.perf_counter()
                run(command, group)
                seconds[name].append(time.perf_counter() - started)
                kept[name].append(resident_share(other))
                if number == 0 and not nf.verify(work / "hf", work / "out").equal:
                    sys.exit(f"{name} wrote something else; no time is shown")
    anchor = seconds["cp -r && sync"]
    print(f"{num_bytes / 1e9:.2f} GB with {limit / 1e9:.2f} GB of memory")
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, anchor, strict=True))
        row = {
            "name": name,
            "seconds": times,
            "ratio": ratio,
            "other_file_kept": statistics.median(kept[name]),
        }
        rows.append(row)
        print(f"  {name:16}{statistics.median(times):8.2f} s{ratio:7.2f}x", end="")
        print(f"   {row['other_file_kept']:4.0%} of the other file still cached")
    if args.save:
        document = {
            "environment": environment(),
            "bytes": num_bytes,
            "memory_bytes": limit if group else None,
            "page_cache": "cold source",
            "variants": rows,
        }
        args.save.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
