"""Tensors beyond the 2 MiB of a block and the 24 MiB of a transposed matrix."""

import numpy as np
import pytest

from nanotron_fast import _C
from nanotron_fast.moves import engine
from nanotron_fast.moves import numpy_engine as reference
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move, table_of
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.moves.row import FILL
from tests.strides import permuted

MIB = 2**20


def large_plans():
    """Moves whose sizes and offsets are odd in every way."""
    bf16, f16, f32, f64 = (Dtype.BF16,) * 2, (Dtype.F16,) * 2, (Dtype.F32,) * 2, (Dtype.F64,) * 2
    narrow = (Dtype.F32, Dtype.BF16)
    n, wide, tall = 3_000_001, 3001, 2777
    yield "contiguous", [Move(0, 2, 0, 0, (n, 1, 1), (1, 1, 1), (1, 1, 1), *bf16)]
    yield "narrowed", [Move(0, 2, 0, 0, (n, 1, 1), (1, 1, 1), (1, 1, 1), *narrow)]
    yield "zeros", [Move(FILL, 0, 0, 0, (n, 1, 1), (0, 0, 0), (1, 1, 1), *f16)]
    for name, dtypes in {"bf16": bf16, "f32": f32, "f64": f64, "f32-bf16": narrow}.items():
        sizes = (wide, tall, 1)
        move = Move(0, 3, 0, 0, sizes, permuted(sizes, (1, 0, 2)), (tall, 1, 1), *dtypes)
        yield f"transposed {name}", [move]
    yield (
        "columns split",
        [
            Move(0, 2 + 2 * 601 * i, i, 0, (wide, 601, 1), (1803, 1, 1), (601, 1, 1), *bf16)
            for i in range(3)
        ],
    )
    yield (
        "columns joined",
        [
            Move(i, 1, 0, 2 * 601 * i, (wide, 601, 1), (601, 1, 1), (1202, 1, 1), *narrow)
            for i in range(2)
        ],
    )
    half = (n // 2, 2, 1)
    yield "interleaved", [Move(0, 5, 0, 0, half, (1, n // 2, 1), (2, 1, 1), *f16)]
    row = 13 * MIB
    yield (
        "giant rows",
        [
            Move(i, 1, 0, 2 * row * i, (2, row, 1), (row, 1, 1), (2 * row, 1, 1), *bf16)
            for i in range(2)
        ],
    )
    experts, hidden, inner = 2, 2201, 1777  # gate and up, transposed, for two ranks
    per_expert, share = 4 * hidden * inner, (experts, inner, hidden)
    inside = [2 * (i // 2 * inner + i % 2 * 2 * inner) for i in range(4)]
    shard = [2 * experts * hidden * inner * (i % 2) for i in range(4)]
    strides = (inner * hidden, hidden, 1)
    yield (
        "experts split",
        [
            Move(0, inside[i], i // 2, shard[i], share, (per_expert, 1, 4 * inner), strides, *bf16)
            for i in range(4)
        ],
    )
    yield (
        "experts joined",
        [
            Move(i // 2, shard[i], 0, inside[i], share, strides, (per_expert, 1, 4 * inner), *bf16)
            for i in range(4)
        ],
    )


def ends(moves, side):
    """Bytes up to the last that each file's moves touch."""
    result = {}
    for move in moves:
        file, offset = getattr(move, side), getattr(move, f"{side}_offset")
        if file == FILL:
            continue
        strides = getattr(move, f"{side}_strides")
        reach = sum((n - 1) * s for n, s in zip(move.sizes, strides, strict=True))
        end = offset + (1 + reach) * getattr(move, f"{side}_dtype").itemsize
        result[file] = max(end, result.get(file, 0))
    return result


PLANS = dict(large_plans())


@pytest.mark.parametrize("name", PLANS)
def test_large_tensors(name, tmp_path):
    moves = PLANS[name]
    random = np.random.default_rng(0)
    sources = tuple(tmp_path / f"source-{i}" for i in range(3))
    for file, path in enumerate(sources):
        path.write_bytes(random.bytes(ends(moves, "source").get(file, 0)))
    outputs = [OutputFile(f"{i}", b"", end) for i, end in ends(moves, "destination").items()]
    plan = MovePlan(sources, tuple(outputs), tuple(moves))
    plan.check()
    done = []
    wanted = reference.execute_in_memory(plan)
    engine.execute(plan, tmp_path, workers=3, on_progress=done.append)
    for path, data in wanted.items():
        assert (tmp_path / path).read_bytes() == data.tobytes()
    assert done == sorted(done)
    assert done[-1] == plan.bytes_written
    written = [tmp_path / output.path for output in plan.outputs]
    assert engine.compare(sources, written, moves, workers=3) == []
    size = outputs[-1].size_bytes
    with open(written[-1], "r+b") as stream:
        stream.seek(size - 1)
        last = stream.read(1)[0]
        stream.seek(size - 1)
        stream.write(bytes([last ^ 1]))
    item = moves[-1].destination_dtype.itemsize
    found = engine.compare(sources, written, moves, workers=3)
    assert found == [(len(moves) - 1, 1, size - item)]
    assert _C.worker_buffer_bytes(table_of(moves), compares=True) <= 100 * MIB
