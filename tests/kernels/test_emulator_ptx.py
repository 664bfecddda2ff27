"""The emulator computes what PTX says, and refuses what it does not know.

These tests run under it: `python -m tests.kernels.emulator tests/kernels/test_emulator_ptx.py`.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct

import pytest
import torch

IS_HERE = "EMULATOR_ARCH" in os.environ
pytestmark = pytest.mark.skipif(not IS_HERE, reason="needs the emulator")

REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<9>;"


class Config(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


# Each thread copies four bytes to its own place in shared memory, which %r2 is.
COPY = "shl.b32 %r2, %r0, 2; cp.async.ca.shared.global [%r2], [%rd1], 4; cp.async.commit_group;"


def told(error: int) -> None:
    if error:
        text = ctypes.c_char_p()
        ctypes.CDLL("libcuda.so.1").cuGetErrorString(error, ctypes.byref(text))
        raise RuntimeError((text.value or b"").decode())


def load(text: str) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    told(ctypes.CDLL("libcuda.so.1").cuModuleLoadData(ctypes.byref(module), text.encode()))
    return module


def kernel(body: str) -> str:
    start = "ld.param.b64 %rd0, [to]; mov.u32 %r0, %tid.x; mul.wide.u32 %rd1, %r0, 4;"
    return f".entry k(.param .u64 to) {{ {REGISTERS} {start} add.s64 %rd1, %rd0, %rd1; {body} }}\n"


def run(body: str, threads: int = 32, shared_bytes: int = 0) -> list[int]:
    """What %r1 is in each thread in the end, of a kernel that begins with its number in %r0."""
    result = torch.full((threads,), -1, dtype=torch.int32)
    function = load(kernel(f"{body} st.global.b32 [%rd1], %r1; ret;"))
    config = Config((1, 1, 1), (threads, 1, 1), shared_bytes)
    address = ctypes.c_uint64(result.data_ptr())
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(address))
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    told(launch(ctypes.byref(config), function, parameters, None))
    return [each & 0xFFFFFFFF for each in result.tolist()]


def bits(number: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


SMALL = 0x00000001  # the least subnormal number
NAN = 0x7FFFFFFF


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mov.pred %p0, -1; setp.eq.b32 %p1, %r0, %r0; xor.pred %p2, %p0, %p1;", 0),
        ("mov.pred %p0, 0; not.pred %p1, %p0; xor.pred %p2, %p0, %p1;", 1),
        ("setp.ne.f32 %p2, 0f7FFFFFFF, 0f00000000;", 0),
        ("setp.neu.f32 %p2, 0f7FFFFFFF, 0f00000000;", 1),
        ("setp.gt.ftz.f32 %p2, 0f00000001, 0f00000000;", 0),
        ("setp.gt.f32 %p2, 0f00000001, 0f00000000;", 1),
        ("mov.pred %p0, 1; setp.lt.and.s32 %p1|%p2, 2, 1, %p0;", 1),
        ("mov.pred %p0, 1; setp.lt.and.s32 %p1|%p2, 2, 1, !%p0;", 0),
    ],
)
def test_predicates(body: str, expected: int) -> None:
    assert run(f"{body} selp.b32 %r1, 1, 0, %p2;") == [expected] * 32


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("rsqrt.approx.ftz.f32 %r1, 0f00000001", bits(math.inf)),
        ("mul.ftz.f32 %r1, 0f00000001, 0f7F000000", 0),
        ("mul.f32 %r1, 0f00000001, 0f7F000000", bits(2.0**-149 * 2.0**127)),
        ("add.ftz.f32 %r1, 0f80000001, 0f80000000", 0x80000000),
        ("min.f32 %r1, 0f00000000, 0f80000000", 0x80000000),
        ("max.f32 %r1, 0f80000000, 0f00000000", 0),
        ("max.f32 %r1, 0f7FFFFFFF, 0f3F800000", bits(1.0)),
        ("max.NaN.f32 %r1, 0f3F800000, 0f7FFFFFFF", NAN),
        ("cvt.rna.tf32.f32 %r1, 0f7FFFFFFF", NAN),
        ("cvt.rna.tf32.f32 %r1, 0f3F801000", 0x3F802000),
        ("cvt.rzi.s32.f32 %r1, 0f7FFFFFFF", 0),
        ("cvt.rzi.s32.f32 %r1, 0f4F800000", 0x7FFFFFFF),
        ("cvt.rzi.u32.f32 %r1, 0fBF800000", 0),
        ("cvt.rni.s32.f32 %r1, 0f40200000", 2),
        ("cvt.rn.bf16x2.f32 %r1, 0f3F800000, 0f40000000", 0x3F804000),
        ("cvt.rn.relu.bf16x2.f32 %r1, 0fBF800000, 0f40000000", 0x00004000),
        ("div.s32 %r1, -2147483648, -1", 0x80000000),
        ("rem.s32 %r1, -2147483648, -1", 0),
        ("rem.s32 %r1, -7, 3", 0xFFFFFFFF),
        ("mul.hi.s32 %r1, -2, 3", 0xFFFFFFFF),
        ("mul.hi.u32 %r1, -2, 3", 2),
        ("mul.wide.s16 %r1, -2, 3", 0xFFFFFFFA),
        ("mul.wide.u16 %r1, 65535, 65535", 65535 * 65535),
        ("shl.b32 %r1, 1, 32", 0),
        ("shr.s32 %r1, -1, 99", 0xFFFFFFFF),
        ("shf.l.wrap.b32 %r1, 0x80000000, 1, 33", 3),
        ("shf.l.clamp.b32 %r1, 5, 1, 33", 5),
        ("shf.r.clamp.b32 %r1, 5, 7, 40", 7),
        ("bfe.s32 %r1, 0x70, 4, 3", 0xFFFFFFFF),
        ("bfe.u32 %r1, 0x80000000, 31, 8", 1),
        ("bfe.s32 %r1, 0x80000000, 40, 8", 0xFFFFFFFF),
        ("bfe.s32 %r1, -1, 4, 0", 0),
        ("prmt.b32 %r1, 0x33221180, 0x77665544, 0x7168U", 0x771166FF),
        ("lop3.b32 %r1, 0xF0, 0xCC, 0xAA, 0xE4", 0xE4),
        ("abs.s32 %r1, -5", 5),
        ("min.relu.s32 %r1, -5, 5", 0),
    ],
)
def test_arithmetic(instruction: str, expected: int) -> None:
    assert run(f"{instruction};") == [expected] * 32


@pytest.mark.parametrize(
    ("how", "source"),
    [
        ("up.b32 %r1, %r0, 1, 0", lambda i: max(i - 1, 0)),
        ("up.b32 %r1, %r0, 2, 0x1800", lambda i: i - 2 if i % 8 >= 2 else i),
        ("down.b32 %r1, %r0, 2, 0x181f", lambda i: i + 2 if i % 8 < 6 else i),
        ("idx.b32 %r1, %r0, 9, 0x181f", lambda i: i // 8 * 8 + 1),
        ("bfly.b32 %r1, %r0, 33, 31", lambda i: i ^ 1),
    ],
)
def test_shuffles(how: str, source: object) -> None:
    assert callable(source)
    assert run(f"shfl.sync.{how}, -1;") == [source(lane) for lane in range(32)]


def test_lanes_part_and_meet() -> None:
    loop = "mov.b32 %r1, 0; L: add.s32 %r1, %r1, 1; setp.lt.s32 %p0, %r1, %r0; @%p0 bra L;"
    total = "redux.sync.add.s32 %r1, %r1, -1;"
    assert run(loop + total) == [sum(max(lane, 1) for lane in range(32))] * 32
    with pytest.raises(RuntimeError, match="other lanes are here than it names"):
        run("setp.lt.s32 %p0, %r0, 9; @%p0 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;")


@pytest.mark.parametrize(
    "instruction",
    [
        "add.rz.f32 %r1, %r1, %r2",
        "add.sat.s32 %r1, %r1, %r2",
        "add.cc.u32 %r1, %r1, %r2",
        "cvt.rz.bf16x2.f32 %r1, %r2, %r3",
        "cvt.rn.satfinite.f16x2.f32 %r1, %r2, %r3",
        "prmt.b32.f4e %r1, %r2, %r3, %r4",
        "min.xorsign.abs.f32 %r1, %r2, %r3",
        "ld.volatile.global.b32 %r1, [%rd1]",
        "ld.b32 %r1, [%rd1]",
        "ld.global.b128 %rd1, [%rd1]",
        "atom.global.add.s32 %r1, [%rd1], %r2",
        "bar.arrive 0, 64",
        "bar.sync 0, 64",
        "bar.red.popc.u32 %r1, 0, %p1",
        "barrier.cluster.arrive",
        "vote.sync.uni.pred %p1, %p2, -1",
        "cvta.shared.u64 %rd1, %rd2",
        "add.s32 %r1",
        "call f",
    ],
)
def test_what_is_not_known_is_refused(instruction: str) -> None:
    with pytest.raises(RuntimeError, match="unknown instruction"):
        load(kernel(f"{instruction}; ret;"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no kernel"),
        (".entry k()", "the kernel has no body"),
        (kernel("ret;") * 2, "there are several kernels"),
        (kernel("mov.u32 %r1, %clock;"), "unknown name %clock"),
        (kernel("mov.u32 %r1, %smid3;"), "unknown name %smid"),
        (kernel("mov.u32 %r1, %r40;"), "unknown name %r40"),
        (kernel("mov.u32 %r1, %tid.w;"), "unknown name %tid.w"),
        (kernel("mov.u32 %r1, 0b101;"), "unknown number 0b101"),
        (kernel("add.f32 %r1, %r1, 1.5;"), "unknown number 1.5"),
        (kernel("mov.b64 {%r1, %r2, %r3}, %rd1;"), "an odd vector"),
        (kernel("ld.global.v4.b32 {%r1, %r2}, [%rd1];"), "this needs a vector of 4"),
        (kernel("bra Nowhere;"), "unknown name Nowhere"),
        (kernel("mov.u32 %r1, " + "!" * 100_000 + "%r1;"), "unknown name"),
        (kernel("mov.b64 " + "{" * 100_000 + ", %r1;"), "unknown instruction"),
        (kernel("{"), "the text ends too early"),
    ],
)
def test_odd_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        load(text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("L: bra L;", "a loop without an end"),
        ("ld.global.b32 %r1, [to];", "an operand is no address"),
        ("ld.param.b64 %rd2, [to+4];", "out of bounds: of a parameter"),
        ("cp.async.ca.shared.global [0], [%rd0], 0;", "a copy of 0 bytes"),
        ("st.global.b32 [%rd0], %r0;", "another lane writes other bytes"),
        (COPY + "ld.shared.b32 %r1, [%r2];", "race: byte 0 of shared memory is still copied to"),
        (COPY + "st.shared.b32 [%r2], %r2;", "race: byte 0 of shared memory is still copied to"),
        (COPY + COPY, "race: byte 0 of shared memory is still copied to"),
        (
            COPY
            + COPY.replace("shl.b32", "mad.lo.s32").replace(", 2;", ", 4, 128;")
            + "cp.async.wait_group 2; ld.shared.b32 %r1, [%r2];",
            "race: byte 128 of shared memory is still copied to",
        ),
        (
            "setp.lt.s32 %p0, %r0, 9; @%p0 bar.sync 0;",
            "only some lanes of a warp come to a barrier",
        ),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(body, shared_bytes=256)


def test_a_barrier_that_no_lane_comes_to() -> None:
    assert run("mov.b32 %r1, 7; setp.lt.s32 %p0, %r0, 0; @%p0 bar.sync 0;") == [7] * 32


def test_copies_need_a_barrier_behind_their_wait() -> None:
    turn = "xor.b32 %r3, %r2, 128; ld.shared.b32 %r1, [%r3];"  # what the other warp has copied
    wait = "cp.async.wait_group 0;"
    assert run(f"{COPY} {wait} bar.sync 0; {turn}", 64, 256) == [0xFFFFFFFF] * 64
    with pytest.raises(RuntimeError, match=r"race: byte \d+ of shared memory is still copied to"):
        run(f"{COPY} bar.sync 0; {wait} {turn}", 64, 256)
    with pytest.raises(RuntimeError, match=r"race: byte .* of shared memory"):
        run(f"{COPY} {wait} {turn}", 64, 256)
