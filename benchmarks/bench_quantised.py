"""Times dequantising on import beside a plain copy, a cast, and transformers' own arithmetic.

Each variant makes the same number of bf16 values from a file in the page cache and writes them to
a file. Rounds run each variant once; what counts is the ratio to the copy in the same round, and of
ours to transformers'. Nothing is timed before it has written the bytes that transformers writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_convert import environment
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nanotron_fast.moves import engine
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.pieces import Piece, moves_between
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.moves.scales import Quantised, ScaleDtype, Scales

BLOCK = 128
# The anchors are of the same number of elements, and of other bytes.
COPY, CAST, TURNED = "copy bf16", "cast fp32 to bf16", "copy bf16, transposed"
OURS = {"fp8": "fp8 128x128", "mxfp4": "mxfp4, transposed"}
THEIRS = {"fp8": "fp8, transformers", "mxfp4": "mxfp4, transformers"}


def source_of(kind: Quantised, shape: tuple[int, int, int], strides: tuple[int, int, int]) -> Piece:
    """A stack of matrices in file 0, its scales in file 1."""
    experts, rows, columns = shape
    if kind is Quantised.E2M1:
        scales = Scales(1, 0, ScaleDtype.MICRO, 0, experts * rows, columns // 2, 1, 16)
    else:
        scales = Scales(1, 0, ScaleDtype.F32, 0, rows, columns, BLOCK, BLOCK)
    return Piece(0, 0, kind, (0, 0, 0), shape, strides, scales)


class Work:
    """Files of codes, scales and floats, and what to do with them."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], workers: int) -> None:
        self.folder, self.shape, self.workers = folder, shape, workers
        experts, rows, columns = shape
        random = np.random.default_rng(0)
        self.count = experts * rows * columns
        codes = random.integers(0, 256, self.count, np.uint8)
        codes[codes & 0x7F == 0x7F] = 0
        self.codes = torch.from_numpy(codes)
        self.factors = torch.from_numpy(
            random.uniform(1e-4, 1e-2, (experts, rows // BLOCK, columns // BLOCK)).astype("f4")
        )
        self.blocks = torch.from_numpy(random.integers(0, 256, self.count // 2, np.uint8))
        self.exponents = torch.from_numpy(random.integers(110, 128, self.count // 32, np.uint8))
        for name, data in (
            ("codes", self.codes),
            ("factors", self.factors),
            ("blocks", self.blocks),
            ("exponents", self.exponents),
        ):
            (folder / name).write_bytes(data.numpy().tobytes())
        for name, itemsize in (("bf16", 2), ("fp32", 4)):
            (folder / name).write_bytes(bytes(self.count * itemsize))

    def variants(self) -> dict[str, Callable[[], None]]:
        """By name."""
        _, rows, columns = self.shape
        plain = (rows * columns, columns, 1)
        low = (0, 0, 0)
        floats = {
            name: Piece(0, 0, dtype, low, self.shape, plain)
            for name, dtype in (("bf16", Dtype.BF16), ("fp32", Dtype.F32))
        }
        target = Piece(0, 0, Dtype.BF16, low, self.shape, plain)
        turned = target._replace(strides=(rows * columns, 1, rows))
        fp8 = source_of(Quantised.E4M3, self.shape, plain)
        mxfp4 = source_of(Quantised.E2M1, self.shape, plain)
        return {
            COPY: lambda: self._run(("bf16",), floats["bf16"], target),
            CAST: lambda: self._run(("fp32",), floats["fp32"], target),
            TURNED: lambda: self._run(("bf16",), floats["bf16"], turned),
            OURS["fp8"]: lambda: self._run(("codes", "factors"), fp8, target),
            THEIRS["fp8"]: self._fp8_by_transformers,
            OURS["mxfp4"]: lambda: self._run(("blocks", "exponents"), mxfp4, turned),
            THEIRS["mxfp4"]: self._mxfp4_by_transformers,
        }

    def result(self) -> bytes:
        """What the last variant has written."""
        return (self.folder / "out").read_bytes()

    def _run(self, sources: tuple[str, ...], source: Piece, target: Piece) -> None:
        plan = MovePlan(
            tuple(self.folder / name for name in sources),
            (OutputFile("out", b"", 2 * self.count),),
            tuple(moves_between(source, target)),
        )
        engine.execute(plan, self.folder, workers=self.workers)

    def _load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.fromfile(self.folder / name, np.uint8)).view(dtype)

    def _write(self, values: torch.Tensor) -> None:
        values.view(torch.int16).numpy().tofile(self.folder / "out")

    def _fp8_by_transformers(self) -> None:
        codes = self._load("codes", torch.float8_e4m3fn).view(self.shape)
        factors = self._load("factors", torch.float32).view(self.factors.shape)
        self._write(Fp8Dequantize(None)._dequantize_one(codes, factors, torch.bfloat16))

    def _mxfp4_by_transformers(self) -> None:
        experts, rows, _ = self.shape
        blocks = self._load("blocks", torch.uint8).view(experts, rows, -1, 16)
        exponents = self._load("exponents", torch.uint8).view(experts, rows, -1)
        self._write(convert_moe_packed_tensors(blocks, exponents))


def check(work: Work, variants: dict[str, Callable[[], None]]) -> None:
    """Ends the program where ours are not the bytes of transformers."""
    for kind, name in OURS.items():
        found = []
        for each in (name, THEIRS[kind]):
            (work.folder / "out").unlink(missing_ok=True)
            variants[each]()
            found.append(work.result())
        if found[0] != found[1]:
            sys.exit(f"{name} wrote something else than transformers; no time is shown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--rows", type=int, default=5760)
    parser.add_argument("--columns", type=int, default=2944)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1, help="threads, of torch as well")
    parser.add_argument("--directory", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--save", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.workers)
    shape = (args.experts, args.rows, args.columns)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="nanotron_fast-bench-") as folder:
        work = Work(Path(folder), shape, args.workers)
        variants = work.variants()
        check(work, variants)
        for _ in range(args.rounds):
            for name, run in variants.items():
                (work.folder / "out").unlink(missing_ok=True)
                started = time.perf_counter()
                run()
                seconds.setdefault(name, []).append(time.perf_counter() - started)

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    print(f"{work.count / 1e6:.0f} million values, {2 * work.count / 1e9:.2f} GB written")
    rows = []
    for name, times in seconds.items():
        row = {"name": name, "seconds": times, "to_copy": ratio(name, COPY)}
        line = f"  {name:22}{statistics.median(times):8.3f} s{row['to_copy']:7.2f}x a copy"
        for kind, ours in OURS.items():
            if ours == name:
                row["to_transformers"] = ratio(name, THEIRS[kind])
                line += f"{row['to_transformers']:7.2f}x transformers"
        rows.append(row)
        print(line)
    if args.save:
        document = {"environment": environment(), "values": work.count, "variants": rows}
        args.save.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
