"""Times the converter beside `cp -r`, a plain loop of reads and writes, and a torch script.

Every round runs each variant once, in turn, from a cold start of its process and a warm page cache,
after writing back what the one before left dirty. What counts is the ratio to `cp -r` of the source
in the same round; its median is shown. A case is only timed after `verify` found it equal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import models
from watched import run_watched

import nanotron_fast as nf
from nanotron_fast.moves.dtypes import Dtype

RESULTS = Path(__file__).parent / "results"
BASELINE = Path(__file__).parent / "torch_baseline.py"
PLAIN_LOOP = Path(__file__).parent / "plain_loop.py"
OURS = [sys.executable, "-m", "nanotron_fast"]
# Modules are compiled once, as an installation does: a process that may not cache them would
# recompile ours on each start and not torch's.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


@dataclass
class Samples:
    """Seconds of one variant in each round, and what else it reported.

    `inner_seconds` are its own: without starting the interpreter and importing the command.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    inner_seconds: list[float] = field(default_factory=list)
    peak_rss_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Case:
    """Commands that take the same source somewhere; the first is the anchor."""

    title: str
    source: Path
    # Name -> command with {out} for the destination.
    commands: dict[str, list[str]]
    target: str
    check: Callable[[Path], bool]


def run(command: list[str], out: Path, samples: Samples) -> None:
    """One timed run into an empty place, from a file system with nothing left to write."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    words = [word.replace("{out}", str(out)) for word in command]
    ended = run_watched(words, ENVIRONMENT)
    samples.seconds.append(ended.seconds)
    if ended.status != 0:
        sys.exit(f"failed: {' '.join(words)}")
    peak = ended.peak_rss_bytes
    if ended.stdout.startswith("{"):
        report = json.loads(ended.stdout)
        samples.inner_seconds.append(report["seconds"])
        peak = report["peak_rss_bytes"]
    samples.peak_rss_bytes = max(samples.peak_rss_bytes, peak)


def measure(case: Case, rounds: int, work: Path) -> dict[str, object]:
    """All variants of a case, interleaved."""
    samples = {name: Samples(name) for name in case.commands}
    for round_number in range(rounds):
        for name, command in case.commands.items():
            out = work / "out"
            run(command, out, samples[name])
            if round_number == 0 and name.startswith("nanotron-fast") and not case.check(out):
                sys.exit(f"{case.title}: {name} wrote something else; no time is shown")
        shutil.rmtree(work / "out", ignore_errors=True)
    anchor = next(iter(samples.values()))
    rows = []
    for variant in samples.values():
        ratios = [a / b for a, b in zip(variant.seconds, anchor.seconds, strict=True)]
        rows.append(
            {
                **asdict(variant),
                "median_seconds": variant.median,
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        )
    spread = max(anchor.seconds) / min(anchor.seconds)
    return {"title": case.title, "target": case.target, "anchor_spread": spread, "variants": rows}


def show(result: dict[str, object]) -> None:
    print(f"\n{result['title']}   (target: {result['target']})")
    print(f"  {'':34}{'median s':>9}{'ratio':>8}{'inside s':>10}{'peak MB':>9}")
    for row in result["variants"]:
        inner = statistics.median(row["inner_seconds"]) if row["inner_seconds"] else None
        print(
            f"  {row['name']:34}{row['median_seconds']:9.3f}{row['ratio']:7.2f}x"
            f"{'' if inner is None else format(inner, '10.3f'):>10}"
            f"{row['peak_rss_bytes'] / 1e6:9.0f}"
        )
    if result["anchor_spread"] > 2:
        print(f"  the anchor itself varied {result['anchor_spread']:.1f}-fold: a noisy batch")


def convert(src: Path, *options: str) -> list[str]:
    return [*OURS, "convert", str(src), "{out}", "--json", *options]


def baseline(way: str, src: Path, *rest: str) -> list[str]:
    return [sys.executable, str(BASELINE), way, str(src), "{out}", *rest]


def plain_loop(src: Path, num_files: int) -> list[str]:
    return [sys.executable, str(PLAIN_LOOP), str(src), "{out}", str(num_files)]


def copy(src: Path) -> list[str]:
    return ["cp", "-r", str(src), "{out}"]


def copy_and_sync(src: Path) -> list[str]:
    return ["sh", "-c", f"cp -r {src} {{out}} && sync"]


def same_as(src: Path) -> Callable[[Path], bool]:
    return lambda out: nf.verify(src, out).equal


def cases(work: Path, shape: str) -> list[Case]:
    """The models are made here, the Nanotron side by ourselves."""
    hf, hf_fp32, hf_8kv, nanotron = (
        work / "hf",
        work / "hf-fp32",
        work / "hf-8kv",
        work / "nanotron",
    )
    num_bytes = models.make_model(hf, shape)
    models.make_model(hf_fp32, shape, dtype=Dtype.F32)
    models.make_model(hf_8kv, "llama-1.1b-8kv" if shape != "tiny" else "tiny")
    nf.convert(hf, nanotron)
    num_files = sum(1 for _ in nanotron.rglob("*.safetensors"))
    shard = str(num_bytes // 4 + 50_000_000 if shape != "tiny" else num_bytes // 4)
    tp = "8" if shape != "tiny" else "4"
    both = {"cp -r": copy, "cp -r && sync": copy_and_sync}
    return [
        Case(
            f"{shape}, Hugging Face -> Nanotron",
            hf,
            {
                "cp -r": both["cp -r"](hf),
                f"plain loop, {num_files} files": plain_loop(hf, num_files),
                "nanotron-fast": convert(hf),
                "torch script": baseline("to-nanotron", hf, "1"),
            },
            "0.8x of cp, 1.1x of the plain loop, 5x faster than torch",
            same_as(hf),
        ),
        Case(
            f"{shape}, Hugging Face -> Nanotron, durable",
            hf,
            {
                "cp -r && sync": both["cp -r && sync"](hf),
                "nanotron-fast --fsync": convert(hf, "--fsync"),
            },
            "1.0x of cp and sync",
            same_as(hf),
        ),
        Case(
            f"{shape}, Nanotron -> Hugging Face",
            nanotron,
            {
                "cp -r": copy(nanotron),
                "plain loop, one file": plain_loop(nanotron, 1),
                "nanotron-fast, one file": convert(nanotron, "--max-shard-size", "100GB"),
                "nanotron-fast, four shards": convert(nanotron, "--max-shard-size", shard),
                "torch script": baseline("to-hf", nanotron),
            },
            "1.0x (one file), 0.9x (four shards) of cp, 1.1x of the plain loop",
            same_as(nanotron),
        ),
        Case(
            f"8 key-value heads, Hugging Face -> Nanotron at TP={tp}",
            hf_8kv,
            {
                "nanotron-fast --tp 1": convert(hf_8kv),
                f"nanotron-fast --tp {tp}": convert(hf_8kv, "--tp", tp),
                "cp -r": copy(hf_8kv),
                f"torch script, TP={tp}": baseline("to-nanotron", hf_8kv, tp),
            },
            "1.3x of TP=1",
            same_as(hf_8kv),
        ),
        Case(
            f"{shape} in fp32, Hugging Face -> Nanotron in bf16",
            hf_fp32,
            {
                "cp -r": copy(hf_fp32),
                "nanotron-fast --dtype bf16": convert(hf_fp32, "--dtype", "bf16"),
            },
            "faster than cp of the source",
            same_as(hf_fp32),
        ),
    ]


def start_up(rounds: int) -> dict[str, float]:
    """Median seconds of what a user waits for before anything happens."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import nanotron_fast": [sys.executable, "-c", "import nanotron_fast"],
        "nanotron-fast --help": [*OURS, "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(max(5, rounds)):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def plan_70b(work: Path) -> dict[str, float]:
    """Seconds and peak bytes of a dry run on headers of Llama-2-70B; the files are holes."""
    src = work / "hf-70b"
    models.make_hollow_model(src, "llama-70b", num_shards=15)
    command = [*OURS, "convert", str(src), str(work / "out"), "--tp", "8", "--pp", "4"]
    samples = Samples("plan")
    started = time.perf_counter()
    result = subprocess.run(
        [*command, "--dry-run", "--json"], check=True, capture_output=True, env=ENVIRONMENT
    )
    samples.seconds.append(time.perf_counter() - started)
    report = json.loads(result.stdout)
    return {
        "seconds": samples.seconds[0],
        "expected_peak_bytes": report["peak_memory_bytes"],
        "tensor_files": report["tensor_files"],
        "bytes_written": report["bytes_written"],
    }


def environment() -> dict[str, str]:
    def first(command: list[str]) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    cpu = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "date": datetime.date.today().isoformat(),
        "commit": first(["git", "rev-parse", "--short", "HEAD"]),
        "cpu": f"{cpu}, {len(os.sched_getaffinity(0))} cores",
        "memory_gb": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nanotron_fast": nf.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="tinyllama-1.1b", choices=[*models.SHAPES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="cases whose title has this in it")
    parser.add_argument("--directory", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/convert.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="nanotron_fast-bench-") as folder:
        work = Path(folder)
        found = environment()
        print(", ".join(f"{key} {value}" for key, value in found.items()))
        results = []
        for case in cases(work, args.shape):
            if args.only is None or args.only in case.title:
                results.append(measure(case, args.rounds, work))
                show(results[-1])
        times = start_up(args.rounds)
        print("\n" + "\n".join(f"{name}: {seconds:.3f} s" for name, seconds in times.items()))
        plan = plan_70b(work)
        print(
            f"dry run of a 70B at TP=8 PP=4: {plan['seconds']:.2f} s, "
            f"{plan['expected_peak_bytes'] / 1e6:.0f} MB expected, {plan['tensor_files']} files"
        )
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        document = {
            "environment": found,
            "rounds": args.rounds,
            "page_cache": "warm",
            "cases": results,
            "start_up_seconds": times,
            "plan_70b": plan,
        }
        (RESULTS / "convert.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
