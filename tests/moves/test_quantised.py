"""Quantised sources: the engine and its numpy twin against what transformers makes of them."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nanotron_fast import _C
from nanotron_fast.errors import PlanError
from nanotron_fast.moves import engine
from nanotron_fast.moves import numpy_engine as reference
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move, scales_of, table_of
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.moves.row import FILL
from nanotron_fast.moves.scales import NUM_SCALE_COLUMNS, Code, ScaleDtype, Scales
from nanotron_fast.moves.staging import batches_of
from tests.moves.quantised import BITS, TORCH, builds, bytes_of
from tests.moves.test_engine import write_shares
from tests.plans import small_cuts

CASTABLE = (Dtype.BF16, Dtype.F16, Dtype.F32)
ALL_CODES = bytes(range(256))
level = pytest.mark.parametrize("level", _C.simd_levels())
written = pytest.mark.parametrize("dtype", CASTABLE, ids=lambda dtype: dtype.name)


def values(found, dtype):
    """Bytes as bits, all NaN alike."""
    tensor = torch.frombuffer(bytearray(found), dtype=TORCH[dtype])
    return torch.where(tensor.isnan(), 0x7FFF, tensor.view(BITS[dtype.itemsize]).int())


@level
@written
def test_every_code_at_every_scale_is_what_torch_makes_of_it(level, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for scale in (1.0, 0.0, -0.75, 1.1e-3, 7e-42, 3e38, float("inf"), float("nan")):
        found = _C.dequantise(ALL_CODES, Code.E4M3, dtype, scale, simd=level)
        wanted = bytes_of((codes * scale).to(TORCH[dtype]))
        assert torch.equal(values(found, dtype), values(wanted, dtype)), scale
        if not np.isnan(scale):
            assert found == wanted


@level
@written
def test_every_exponent_of_a_micro_scale_is_what_transformers_makes_of_it(level, dtype, tmp_path):
    """2 ** -127 is subnormal in fp32, and 2 ** 128 is past it, where half of that is not."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 256, 16, 16)
    exponents = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1).expand(1, 256, 16)
    wanted = convert_moe_packed_tensors(blocks, exponents, dtype=TORCH[dtype])[0].T
    for exponent in range(256):
        scale = float(np.ldexp(np.float32(1), exponent - 128))
        found = np.empty((256, 2), f"u{dtype.itemsize}")
        for half, code in enumerate((Code.E2M1_LOW, Code.E2M1_HIGH)):
            data = _C.dequantise(ALL_CODES, code, dtype, scale, simd=level)
            found[:, half] = np.frombuffer(data, found.dtype)
        assert found.tobytes() == bytes_of(wanted[exponent])


@level
@written
def test_every_length(level, dtype):
    for code in Code:
        whole = _C.dequantise(ALL_CODES, code, dtype, 0.3, simd=level)
        for length in range(40):
            part = _C.dequantise(ALL_CODES[:length], code, dtype, 0.3, simd=level)
            assert part == whole[: length * dtype.itemsize]


@settings(deadline=None, max_examples=60)
@given(builds(), st.integers(1, 3), st.sampled_from(["buffered", "direct", "dontcache"]))
def test_values_are_those_of_transformers(build, workers, io):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plan = build.plan(root)
        plan.check()
        by_numpy = reference.execute_in_memory(plan)
        (root / "out").mkdir()
        engine.execute(plan, root / "out", workers=workers, io=io)
        paths = [root / "out" / output.path for output in plan.outputs]
        for path, expected in zip(paths, build.expected, strict=True):
            assert by_numpy[path.name].tobytes() == expected
            assert path.read_bytes() == expected
        assert engine.compare(plan.sources, paths, plan.moves, workers=workers) == []


@settings(deadline=None, max_examples=30)
@given(builds(), st.integers(2, 5))
def test_shares_of_processes_may_be_cut_anywhere(build, world_size):
    with tempfile.TemporaryDirectory() as folder, small_cuts():
        plan = build.plan(Path(folder))
        write_shares(plan, Path(folder), world_size)
        for output, expected in zip(plan.outputs, build.expected, strict=True):
            assert Path(folder, output.path).read_bytes() == expected


@settings(deadline=None, max_examples=50)
@given(builds(), st.sampled_from([4096, 5000, 1 << 20]))
def test_a_load_makes_values_of_them_as_it_reads(build, capacity):
    with tempfile.TemporaryDirectory() as folder:
        plan = build.plan(Path(folder))
        outputs = [np.full(size, 7, np.uint8) for size in build.sizes]
        paths = [bytes(path) for path in plan.sources]
        number = len(outputs)
        batches = batches_of(plan.moves, capacity, staging=number, reads_direct=True)
        num_bytes = num_batches = 0
        for batch in batches:
            num_batches += 1
            staging = np.full(batch.staged_bytes, 0x55, np.uint8)
            assert batch.staged_bytes <= capacity
            memories = [(data.ctypes.data, data.size) for data in (*outputs, staging)]
            num_bytes += _C.read_ranges(
                paths, table_of(batch.reads), memories, workers=2, scales=scales_of(batch.reads)
            )
            for move in batch.packs:
                assert isinstance(move.source_dtype, Dtype)
                assert move.scales is None
                reference.apply_move(move, staging, outputs[move.destination])
        assert tuple(map(bytes, outputs)) == build.expected
        # Of elements of half a byte, each batch may have an odd number.
        assert 0 <= num_bytes - plan.bytes_read <= num_batches


@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (96, 256)], ids=str)
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_blocks_are_those_of_transformers(tmp_path, shape, scale):
    """Where blocks are whole: it refuses others, or takes their size from how many there are."""
    torch.manual_seed(0)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    scales = (torch.rand([-(-size // 128) for size in shape]) + 0.1).to(scale)
    weight = codes.view(torch.float8_e4m3fn)
    wanted = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    stored = {torch.float32: ScaleDtype.F32, torch.bfloat16: ScaleDtype.BF16}
    dtype = stored.get(scale, ScaleDtype.E8M0)
    (tmp_path / "codes").write_bytes(codes.numpy().tobytes())
    (tmp_path / "scales").write_bytes(scales.view(torch.uint8).numpy().tobytes())
    move = Move(
        source=0,
        source_offset=0,
        destination=0,
        destination_offset=0,
        sizes=(*shape, 1),
        source_strides=(shape[1], 1, 1),
        destination_strides=(shape[1], 1, 1),
        source_dtype=Code.E4M3,
        destination_dtype=Dtype.BF16,
        scales=Scales(1, 0, dtype, 0, *shape, 128, 128),
    )
    outputs = (OutputFile("out", b"", 2 * codes.numel()),)
    plan = MovePlan((tmp_path / "codes", tmp_path / "scales"), outputs, (move,))
    engine.execute(plan, tmp_path, workers=1)
    assert (tmp_path / "out").read_bytes() == bytes_of(wanted)


MOVE = Move(
    source=0,
    source_offset=4,
    destination=0,
    destination_offset=0,
    sizes=(2, 3, 1),
    source_strides=(6, 1, 1),
    destination_strides=(3, 1, 1),
    source_dtype=Code.E4M3,
    destination_dtype=Dtype.BF16,
    scales=Scales(1, 2, ScaleDtype.F32, 4, 2, 6, 2, 4),
)


def _scaled(**changes):
    return replace(MOVE, scales=MOVE.scales._replace(**changes))


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (MOVE, None),
        (replace(MOVE, scales=None), "move 0: its source is quantised and has no scales"),
        (replace(MOVE, source_dtype=Dtype.BF16), "its source has scales and is not quantised"),
        (replace(MOVE, destination_dtype=Dtype.F64), "move 0: no cast between its dtypes"),
        (replace(MOVE, destination_dtype=Code.E4M3), "what is quantised is a source alone"),
        (replace(MOVE, source=FILL), "what is quantised is a source alone"),
        (_scaled(source=2), "scales 0: source file 2 is not one of 2"),
        (_scaled(dtype=6), "scales 0: unknown dtype code 6"),
        (_scaled(offset=-1), "scales 0: offset is negative"),
        (_scaled(offset=3), "move 0: its scales end at byte 11 of a file of 10"),
        (_scaled(codes_offset=5), "move 0: it begins before the tensor of its scales"),
        (_scaled(block_rows=0), "scales 0: blocks of 0 x 4 codes in matrices of 2 x 6"),
        (_scaled(rows=2**62), "blocks of 2 x 4 codes in matrices of"),
        (_scaled(block_rows=1), "move 0: its scales end at byte 18 of a file of 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_scales_are_checked_before_a_byte_is_written(tmp_path, move, message):
    (tmp_path / "codes").write_bytes(bytes(32))
    (tmp_path / "scales").write_bytes(bytes(10))
    paths = (tmp_path / "codes", tmp_path / "scales")
    plan = MovePlan(paths, (OutputFile("out", b"", 6 * move.destination_dtype.itemsize),), (move,))
    if message is None:
        engine.execute(plan, tmp_path, workers=1)
        return
    with pytest.raises(PlanError, match=message):
        engine.execute(plan, tmp_path, workers=1)
    assert not (tmp_path / "out").exists()


def test_the_table_of_scales_is_numbered_as_the_moves_are():
    second = _scaled(offset=0)
    moves = [replace(MOVE, scales=None, source_dtype=Dtype.F32), second, MOVE, second]
    assert [row[-1] for row in np.array(table_of(moves)).reshape(-1, _C.NUM_COLUMNS)] == [
        _C.UNSCALED,
        0,
        1,
        0,
    ]
    assert scales_of(moves).tolist() == [*second.scales, *MOVE.scales]
    assert NUM_SCALE_COLUMNS == _C.NUM_SCALE_COLUMNS == len(MOVE.scales)


def test_memory_is_that_of_buffers():
    rows, columns = 1 << 20, 1 << 13
    strides = (columns, 1, 1)
    scales = Scales(1, 0, ScaleDtype.F32, 0, rows, columns, 128, 128)
    sizes = (rows, columns, 1)
    plain = Move(0, 0, 0, 0, sizes, strides, strides, Code.E4M3, Dtype.BF16, scales)
    transposed = replace(plain, destination_strides=(1, rows, 1))
    for move, most in ((plain, 1 << 20), (transposed, 160 << 20)):
        needed = _C.worker_buffer_bytes(table_of([move]), scales=scales_of([move]))
        assert 0 < needed <= most
