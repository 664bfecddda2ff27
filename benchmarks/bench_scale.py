"""Plans conversions of the largest models over 64 ranks, from headers alone; the files are holes.

Of each model: the seconds of the whole command `convert --dry-run` and the most memory that it
held, the files that a rank writes, and how well the shares of 1 to 64 processes balance: the
largest share of bytes over the mean one, with the files that have to be cut for it, and of whole
files alone. With --convert also a conversion of 26 GB for real, beside
`cp` of the same files, every byte of which is read out of holes and written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import models
from bench_convert import ENVIRONMENT, OURS, RESULTS, Samples, environment, run
from watched import run_watched

from nanotron_fast.checkpoints.convert import plan
from nanotron_fast.checkpoints.cut_files import cut_in
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.shares import Part

# Shape, and the files that the published model has.
MODELS = (("llama-405b", 191), ("qwen2-moe-671b", 163))
TOPOLOGY = Topology(tp=8, pp=8)
MAX_PROCESSES = 64
REAL_SHAPE = "llama-13b"
_RANKS = re.compile(r"_pp-rank-(\d+)-of-\d+_tp-rank-(\d+)-of-")


def planned(src: Path, rounds: int) -> dict[str, Any]:
    """One model's row."""
    sizes = ("--tp", str(TOPOLOGY.tp), "--pp", str(TOPOLOGY.pp))
    command = [*OURS, "convert", str(src), "{out}", *sizes, "--dry-run", "--json"]
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    peaks: list[int] = []
    for _ in range(rounds):
        ended = run_watched(command, ENVIRONMENT)
        if ended.status:
            sys.exit(f"{src}: the dry run failed")
        report = json.loads(ended.stdout)
        seconds.append(ended.seconds)
        cpu_seconds.append(ended.cpu_seconds)
        peaks.append(ended.peak_rss_bytes)
    transfer = plan(src, src.with_name("out"), topology=TOPOLOGY).transfer
    files = [(each.path, each.size_bytes) for each in transfer.outputs]
    counts = range(1, MAX_PROCESSES + 1)
    started = time.process_time()
    dealt = {count: transfer.deal(count, cuts=True) for count in counts}
    deal_seconds = (time.process_time() - started) / MAX_PROCESSES
    of_process = [len(parts) for parts in dealt[MAX_PROCESSES]]
    return {
        "model": src.name,
        "parameters": report["num_parameters"],
        "bytes_written": report["bytes_written"],
        "tensor_files": report["tensor_files"],
        "largest_file_bytes": max(size for _, size in files),
        "median_seconds": statistics.median(seconds),
        "seconds": seconds,
        "median_cpu_seconds": statistics.median(cpu_seconds),
        "peak_rss_bytes": max(peaks),
        "expected_bytes_of_conversion": report["peak_memory_bytes"],
        "files_of_a_rank": files_of_ranks([path for path, _ in files]),
        "files_of_a_process": [min(of_process), max(of_process)],
        "deal_cpu_seconds": deal_seconds,
        "balance": {count: balance_of(dealt[count]) for count in counts},
        "balance_of_whole_files": {count: balance_of(transfer.deal(count)) for count in counts},
        "cut_files": {count: len(cut_in(transfer, dealt[count])) for count in counts},
    }


def files_of_ranks(paths: list[str]) -> list[int]:
    """The fewest and the most files that one rank of the topology reads, replicated ones left out.

    A rank's own have its stage and place in their names.
    """
    found = Counter(match.groups() for path in paths if (match := _RANKS.search(path)) is not None)
    return [min(found.values()), max(found.values())]


def balance_of(shares: list[list[Part]]) -> float:
    """The largest share over the mean one, in bytes."""
    loads = [sum(part.end_bytes - part.begin_bytes for part in parts) for parts in shares]
    return max(loads) * len(loads) / sum(loads)


def converted(work: Path) -> list[dict[str, Any]]:
    """A conversion for real, and `cp` of the source, in turn. Only one result lies there at once.

    The engine and `cp` alike read zeros out of holes, and write all of them.
    """
    src = work / REAL_SHAPE
    models.make_hollow_model(src, REAL_SHAPE, num_shards=3)
    size = sum(path.stat().st_size for path in src.glob("*.safetensors"))
    if shutil.disk_usage(work).free < 1.2 * size:
        sys.exit(f"{work}: {size:,} bytes are written, and fewer are free")
    commands = {
        "cp -r --sparse=never": ["cp", "-r", "--sparse=never", str(src), "{out}"],
        "nanotron-fast convert --tp 2": [
            *OURS,
            *("convert", str(src), "{out}", "--tp", "2", "--json"),
        ],
    }
    rows = []
    for name, command in commands.items():
        samples = Samples(name)
        run(command, work / "out", samples)
        shutil.rmtree(work / "out")
        rows.append(
            {
                "name": name,
                "bytes": size,
                "seconds": samples.seconds[0],
                "peak_rss_bytes": samples.peak_rss_bytes,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--convert", action="store_true", help="also write 26 GB, and copy them")
    parser.add_argument("--directory", type=Path, help="a folder on the disk to use")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scale.json")
    args = parser.parse_args()
    found = {**environment(), "load": f"{os.getloadavg()[0]:.1f}"}
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    rows = []
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="nanotron_fast-bench-") as folder:
        for shape, num_files in MODELS:
            src = Path(folder) / shape
            models.make_hollow_model(src, shape, num_shards=num_files)
            rows.append(row := planned(src, args.rounds))
            worst = max(row["balance"], key=row["balance"].get)
            print(
                f"{shape} at {TOPOLOGY}: {row['median_seconds']:.2f} s, "
                f"{row['median_cpu_seconds']:.2f} s of CPU, {row['peak_rss_bytes'] / 1e6:.0f} MB, "
                f"{row['tensor_files']} files, "
                f"balance of 64 processes {row['balance'][64]:.3f}, the worst "
                f"{row['balance'][worst]:.3f} of {worst}, shares in {row['deal_cpu_seconds']:.2f} s"
            )
        conversion = converted(Path(folder)) if args.convert else None
        for each in conversion or ():
            print(
                f"{each['name']}: {each['seconds']:.1f} s, {each['peak_rss_bytes'] / 1e6:.0f} MB, "
                f"{each['bytes'] / 1e9 / each['seconds']:.2f} GB/s"
            )
    path = RESULTS / "scale.json"
    if args.save:
        before = json.loads(path.read_text()).get("conversion") if path.exists() else None
        document = {
            "environment": found,
            "topology": str(TOPOLOGY),
            "scale": rows,
            "conversion": before
            if conversion is None
            else {"environment": found, "rows": conversion},
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
