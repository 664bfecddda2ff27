"""Turns benchmarks/results/*.json into tables (Markdown) and plots (SVG) for the docs.

    python benchmarks/report.py [--out docs/results]

Takes what bench_convert.py, bench_scale.py, bench_load.py, bench_kernels.py, bench_launch.py,
bench_step.py, bench_train.py and pytest-benchmark write, and tells them apart by their keys. Plots
need matplotlib; without it the tables are written alone, and it says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


@dataclass
class Bars:
    """A group of horizontal bars: one variant each, and a line for what they are held against."""

    title: str
    unit: str
    names: list[str]
    values: list[float]
    line: float | None = None


@dataclass
class Section:
    """One result file as text and as plots."""

    name: str
    lines: list[str]
    bars: list[Bars]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def about(environment: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in environment.items())


def files_section(name: str, document: dict[str, Any]) -> Section:
    """Of conversion, whose variants say their memory, and of loading, whose say their speed."""
    lines = [f"Measured: {about(document['environment'])}; {document['rounds']} rounds."]
    bars = []
    for case in document["cases"]:
        has_memory = "peak_rss_bytes" in case["variants"][0]
        rows = [
            (
                variant["name"],
                f"{variant['median_seconds']:.2f}",
                f"{variant['ratio']:.2f}",
                f"{variant['peak_rss_bytes'] / 1e6:.0f}"
                if has_memory
                else f"{variant['gigabytes_per_second']:.1f}",
            )
            for variant in case["variants"]
        ]
        target = f"target: {case['target']}; " if "target" in case else ""
        spread = f"the anchor varied {case['anchor_spread']:.1f}-fold"
        lines += ["", f"{case['title']} ({target}{spread})", ""]
        lines += table(("", "median s", "ratio", "peak MB" if has_memory else "GB/s"), rows)
        variants = case["variants"]
        bars.append(
            Bars(
                case["title"],
                "time as a ratio to the anchor's in the same round (median)",
                [variant["name"] for variant in variants],
                [variant["ratio"] for variant in variants],
                1.0,
            )
        )
    return Section(name, lines, bars)


def kernel_section(name: str, document: dict[str, Any]) -> Section:
    ceilings = document["ceilings"]
    lines = [
        f"Measured: {about(document['environment'])}.",
        f"Ceilings of the same run: device copy {ceilings['copy_gb_per_s']:.0f} GB/s, bare bf16 "
        f"product {ceilings['matmul_tflop_per_s']:.0f} TFLOP/s.",
        "",
    ]
    rows = []
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        key = (row["operation"], row["shape"])
        if row["ok"] is False:
            reason = row["error"].strip().splitlines()[-1]
            rows.append((*key, "", row["variant"], f"not timed: {reason}", "", "", ""))
        elif row["ok"] is None:
            rows.append((*key, "", row["variant"], row["note"], "", "", ""))
        else:
            groups.setdefault((*key, row["phase"]), []).append(row)
            rate = row.get("gb_per_s")
            speed = f"{rate} GB/s" if rate is not None else f"{row.get('tflop_per_s')} TFLOP/s"
            times = (row["p50_ms"], f"{row['p20_ms']} to {row['p80_ms']}")
            share = f"{row.get('fraction_of_ceiling', 0):.0%}"
            rows.append((*key, row["phase"], row["variant"], *times, speed, share))
    header = ("op", "shape", "phase", "variant", "p50 ms", "p20 to p80", "rate", "of the ceiling")
    lines += table(header, rows)
    bars = [
        Bars(
            f"{op}, {phase}, {shape}",
            "share of the ceiling measured in the same run",
            [row["variant"] for row in group],
            [row.get("fraction_of_ceiling", 0.0) for row in group],
            1.0,
        )
        for (op, shape, phase), group in groups.items()
    ]
    return Section(name, lines, bars)


def step_section(name: str, document: dict[str, Any]) -> Section:
    """Of a training step of Nanotron's, the drop-in off and on."""
    lines = [f"Measured: {about(document['environment'])}.", f"{document['model']}.", ""]
    stock = document["variants"][0]
    rows = [
        (
            each["name"],
            each["p50_ms"],
            f"{each['p20_ms']} to {each['p80_ms']}",
            f"{each['tokens_per_s']:.0f}",
            f"{each['p50_ms'] / stock['p50_ms']:.2f}",
            "" if each["peak_gb"] is None else each["peak_gb"],
        )
        for each in document["variants"]
    ]
    header = ("drop-in", "p50 ms", "p20 to p80", "tokens/s", "ratio", "peak GB")
    names, values = zip(*((row[0], float(row[4])) for row in rows), strict=True)
    bars = Bars("a step", "time as a ratio to Nanotron's own", [*names], [*values], 1.0)
    return Section(name, lines + table(header, rows), [bars])


def training_section(name: str, document: dict[str, Any]) -> Section:
    """Of a training step on the CPU, or of several on a GPU."""
    lines = [f"Measured: {about(document['environment'])}.", ""]
    if "training" in document:
        for found in document["training"]:
            low, high = min(found["ratios"]), max(found["ratios"])
            rows = [
                (side["name"], f"{side['process_seconds']:.2f}", f"{side['clock_seconds']:.2f}")
                for side in found["sides"]
            ]
            lines += [
                f"A step of {found['parameters_m']:.0f} M parameters and {found['tokens']} tokens "
                f"in fp32, threads: {found['threads']}. Ours takes {found['ratio']:.2f} of the "
                f"other's process time, {low:.2f} to {high:.2f} in {len(found['ratios'])} rounds.",
                "",
                *table(("", "process s", "clock s"), rows),
                "",
            ]
        return Section(name, lines[:-1], [])
    rows, groups = [], {}
    for step in document["steps"]:
        key = (step["operation"], step["variant"])
        if not step["ok"]:
            rows.append((*key, step.get("note") or step["error"], "", "", "", ""))
            continue
        groups.setdefault(step["operation"], []).append(step)
        spread = f"{step['p20_ms']:.1f} to {step['p80_ms']:.1f}"
        mfu = "" if step["mfu"] is None else f"{step['mfu']:.1%}"
        cells = (f"{step['p50_ms']:.1f}", spread, f"{step['tokens_per_s']:.0f}", mfu)
        rows.append((*key, *cells, step["peak_memory_gb"]))
    header = ("model", "variant", "p50 ms", "p20 to p80", "tokens/s", "MFU", "peak GB")
    bars = [
        Bars(
            f"training, {setting}",
            "tokens a second",
            [step["variant"] for step in steps],
            [step["tokens_per_s"] for step in steps],
        )
        for setting, steps in groups.items()
    ]
    return Section(name, lines + table(header, rows), bars)


def scale_section(name: str, document: dict[str, Any]) -> Section:
    """Of planning the largest models over many processes, and of one conversion for real."""
    lines = [
        f"Measured: {about(document['environment'])}.",
        "",
        f"Plans at {document['topology']} from headers alone (`convert --dry-run`, the whole "
        "command). Balance: the bytes of the largest share over the mean one. The experts of a "
        "layer are in one file whatever TP is, which can be most of a share; where shares of whole "
        "files would be uneven, processes of torchrun write parts of one file. Shares of runs that "
        "do not know each other (`--share`) are made of whole files alone.",
        "",
    ]
    rows, bars = [], []
    for row in document["scale"]:
        balance = {int(count): value for count, value in row["balance"].items()}
        rows.append(
            (
                row["model"],
                f"{row['parameters'] / 1e9:.0f} G",
                f"{row['bytes_written'] / 1e9:,.0f}",
                f"{row['tensor_files']:,}",
                f"{row['largest_file_bytes'] / 1e9:.2f}",
                f"{row['median_seconds']:.1f}",
                f"{row['median_cpu_seconds']:.1f}",
                f"{row['peak_rss_bytes'] / 1e6:.0f}",
                f"{row['expected_bytes_of_conversion'] / 1e6:.0f}",
                " to ".join(map(str, row["files_of_a_rank"])),
                " to ".join(map(str, row["files_of_a_process"])),
            )
        )
        shown = [count for count in (2, 4, 8, 16, 32, 64) if count in balance]
        bars.append(
            Bars(
                row["model"],
                "largest share over the mean, by number of processes",
                [f"{count}" for count in shown],
                [balance[count] for count in shown],
                1.05,
            )
        )
    header = ("model", "parameters", "GB", "files", "largest GB", "s", "CPU s", "MB of the plan")
    more = ("MB expected of the conversion", "files a rank", "files a process of 64")
    lines += table((*header, *more), rows)
    lines.append("")
    counts = ("2", "3", "4", "7", "8", "16", "32", "48", "64")
    lines += table(
        ("balance of processes", *counts, "worst of 1 to 64"),
        [
            (
                f"{row['model']}{what}",
                *(f"{row[key][count]:.3f}" for count in counts),
                f"{max(row[key].values()):.3f}",
            )
            for row in document["scale"]
            for what, key in (("", "balance"), (", whole files", "balance_of_whole_files"))
        ],
    )
    lines.append("")
    lines += table(
        ("files that are cut for it", *counts, "most of 1 to 64"),
        [
            (
                row["model"],
                *(str(row["cut_files"][count]) for count in counts),
                str(max(row["cut_files"].values())),
            )
            for row in document["scale"]
        ],
    )
    if document["conversion"] is not None:
        found = document["conversion"]
        rows = [
            (
                each["name"],
                f"{each['bytes'] / 1e9:.1f}",
                f"{each['seconds']:.1f}",
                f"{each['bytes'] / 1e9 / each['seconds']:.2f}",
                f"{each['peak_rss_bytes'] / 1e6:.0f}",
            )
            for each in found["rows"]
        ]
        lines += ["", f"A conversion out of holes: {about(found['environment'])}.", ""]
        lines += table(("", "GB", "s", "GB/s", "peak MB"), rows)
    return Section(name, lines, bars)


def pytest_section(name: str, document: dict[str, Any]) -> Section:
    machine = document["machine_info"]
    cpu = machine.get("cpu", {})
    lines = [
        f"Measured: {cpu.get('brand_raw', 'unknown CPU')}, {cpu.get('count', '?')} cores, "
        f"Python {machine.get('python_version')}, {document['datetime'][:10]}.",
        "",
    ]
    groups: dict[str, list[tuple[str, float]]] = {}
    for benchmark in document["benchmarks"]:
        variant = benchmark["name"].partition("[")[2].rstrip("]")
        op = benchmark["group"] or variant
        median_ms = benchmark["stats"]["median"] * 1e3
        groups.setdefault(op, []).append((variant.removeprefix(f"{op}-"), median_ms))
    rows = [(op, name, f"{ms:.3f}") for op, group in groups.items() for name, ms in group]
    lines += table(("op", "variant", "median ms, forward and backward"), rows)
    bars = [
        Bars(op, "median ms", [name for name, _ in group], [ms for _, ms in group])
        for op, group in groups.items()
    ]
    return Section(name, lines, bars)


def launch_section(name: str, document: dict[str, Any]) -> Section:
    """What a call costs in Python: of an operation beside a bare function, or of a list."""
    rows = []
    for row in document["launch"]:
        times = [row["ours us"], row.get("bare us", "-"), row.get("ratio", "-")]
        both = ("ours with backward us", "bare with backward us", "ratio with backward")
        times += [row.get(key, "-") for key in both]
        what = f", {row['tensors']} tensors" if "tensors" in row else ""
        rows.append([row["operation"] + what, *times, "yes" if row["ok"] else "no"])
    header = ("call", "us", "bare", "ratio", "with backward", "bare", "ratio", "within its limit")
    lines = [
        f"Measured: {about(document['environment'])}. Python and dispatch alone, the driver",
        "replaced by nothing; bare is an autograd function around the same launches.",
        "",
        *table(header, rows),
    ]
    return Section(name, lines, [])


def read(path: Path) -> Section:
    """Raises ValueError for a file that none of the benchmarks wrote."""
    document = json.loads(path.read_text())
    if "cases" in document:
        return files_section(path.stem, document)
    if "variants" in document:
        return step_section(path.stem, document)
    if "scale" in document:
        return scale_section(path.stem, document)
    if "ceilings" in document:
        return kernel_section(path.stem, document)
    if "launch" in document:
        return launch_section(path.stem, document)
    if "training" in document or "steps" in document:
        return training_section(path.stem, document)
    if "benchmarks" in document:
        return pytest_section(path.stem, document)
    raise ValueError(
        f"{path}: neither cases, variants, ceilings, launch, training, steps nor benchmarks in it"
    )


def plot(section: Section, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = section.name  # the same picture for the same numbers
    matplotlib.rcParams["svg.fonttype"] = "none"  # text, not the outlines of letters
    from matplotlib import pyplot

    heights = [len(bars.names) for bars in section.bars]
    figure, axes = pyplot.subplots(
        len(section.bars),
        1,
        figsize=(8, 0.34 * sum(heights) + 0.95 * len(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, bars in zip(axes[:, 0], section.bars, strict=True):
        is_ours = [
            name.startswith(("ours", "nanotron-fast", "nanotron_fast")) for name in bars.names
        ]
        colors = ["#d95f02" if ours else "#9aa5b1" for ours in is_ours]
        drawn = axis.barh(bars.names, bars.values, color=colors, height=0.7)
        axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(bars.title, fontsize=9, loc="left")
        axis.set_xlabel(bars.unit, fontsize=7)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if bars.line is not None:
            axis.axvline(bars.line, color="#333333", linewidth=0.8, linestyle="--")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    paths = sorted(options.results.glob("*.json"))
    if not paths:
        print(f"{options.results}: no results", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    sections = [read(path) for path in paths]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("matplotlib is not installed: tables without plots", file=sys.stderr)
        has_plots = False
    else:
        has_plots = True
    lines = ["# Results", "", "Written by `benchmarks/report.py` from `benchmarks/results/`."]
    for section in sections:
        lines += ["", f"## {section.name}", "", *section.lines]
        if has_plots and section.bars:
            plot(section, options.out / f"{section.name}.svg")
            lines += ["", f"![{section.name}]({section.name}.svg)"]
    (options.out / "README.md").write_text("\n".join(lines) + "\n")
    print(f"{options.out / 'README.md'}: {len(sections)} sections")
    return 0


if __name__ == "__main__":
    sys.exit(main())
