"""The engine's casts against torch's and numpy's, bit for bit, on every instruction set."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from nanotron_fast import _C
from nanotron_fast.moves import numpy_engine as reference
from nanotron_fast.moves.dtypes import Dtype

LEVELS = _C.simd_levels()
NUM_RANDOM = 30_000_000
BITS = {Dtype.BF16: np.uint16, Dtype.F16: np.uint16, Dtype.F32: np.uint32}
TORCH = {Dtype.BF16: torch.bfloat16, Dtype.F16: torch.float16, Dtype.F32: torch.float32}
INFINITY = {Dtype.BF16: 0x7F80, Dtype.F16: 0x7C00, Dtype.F32: 0x7F80_0000}
SHORT_PAIRS = [(a, b) for a in (Dtype.BF16, Dtype.F16) for b in BITS if a is not b]
PAIRS = [*SHORT_PAIRS, (Dtype.F32, Dtype.BF16), (Dtype.F32, Dtype.F16)]
pair = pytest.mark.parametrize(("source", "destination"), PAIRS, ids=lambda dtype: dtype.name)
level = pytest.mark.parametrize("level", LEVELS)


def patterns(dtype):
    """All bits of 16; of 32 every sign, exponent and edge of rounding, then random ones."""
    if dtype is not Dtype.F32:
        return np.arange(65536, dtype=np.uint16)
    high = np.arange(512, dtype=np.uint32)[:, None] << 23
    units = np.array([0, *(1 << np.arange(23))], np.uint32)
    near = np.concatenate([units, units + 1, units - 1, 3 * units]) & 0x7F_FFFF
    random = np.random.default_rng(0).integers(0, 2**32, NUM_RANDOM, np.uint32)
    return np.concatenate([(high | near).ravel(), random])


@pytest.fixture(scope="module")
def bits():
    return {dtype: patterns(dtype) for dtype in BITS}


def cast(values, source, destination, level=""):
    result = _C.cast(values.tobytes(), source, destination, simd=level)
    return np.frombuffer(result, BITS[destination])


def is_nan(values, dtype):
    return values & (2 ** (8 * dtype.itemsize - 1) - 1) > INFINITY[dtype]


def torch_cast(values, source, destination):
    signed = torch.from_numpy(values.view(f"i{source.itemsize}"))
    result = signed.view(TORCH[source]).to(TORCH[destination])
    return result.view(getattr(torch, f"int{8 * destination.itemsize}")).numpy()


@level
@pair
def test_bits_are_those_of_torch(bits, source, destination, level):
    values = bits[source]
    found = cast(values, source, destination, level)
    wanted = torch_cast(values, source, destination).view(BITS[destination])
    nan = is_nan(values, source)
    assert nan.any()
    assert np.array_equal(found[~nan], wanted[~nan])
    # What a NaN becomes depends on the processor in torch, but for what only moves its bits.
    assert is_nan(found[nan], destination).all()
    assert is_nan(wanted[nan], destination).all()
    if (source, destination) == (Dtype.BF16, Dtype.F32):
        assert np.array_equal(found, wanted)


@level
@pair
def test_bits_of_nan(bits, source, destination, level):
    """Quiet, with sign and payload, except that bfloat16 has one NaN for each source."""
    values = bits[source][is_nan(bits[source], source)]
    found = cast(values, source, destination, level)
    wide = values.astype(np.uint32)
    if destination is Dtype.BF16:
        wanted = np.full(len(values), 0x7FC0 if source is Dtype.F16 else 0xFFFF)
    elif (source, destination) == (Dtype.BF16, Dtype.F32):
        wanted = wide << 16  # the bits as they are, quiet or not
    elif destination is Dtype.F32:
        wanted = (wide & 0x8000) << 16 | 0x7FC0_0000 | (wide & 0x3FF) << 13
    else:
        wide <<= 16 if source is Dtype.BF16 else 0
        wanted = wide >> 16 & 0x8000 | 0x7E00 | wide >> 13 & 0x3FF
    assert np.array_equal(found, wanted)


@level
@pair
def test_bits_are_those_of_the_reference(bits, source, destination, level):
    values = bits[source][:3_000_000]
    in_numpy = np.uint16 if source is Dtype.BF16 else f"f{source.itemsize}"
    wanted = reference.cast(values.view(in_numpy), source, destination)
    assert np.array_equal(cast(values, source, destination, level), wanted.view(BITS[destination]))


@level
@pytest.mark.parametrize(("source", "destination"), SHORT_PAIRS, ids=lambda dtype: dtype.name)
def test_torch_flushing_denormals_changes_nothing(bits, source, destination, level):
    wanted = cast(bits[source], source, destination, level)
    assert torch.set_flush_denormal(True)
    try:
        found = [cast(bits[source][i:], source, destination, level) for i in range(16)]
    finally:
        torch.set_flush_denormal(False)
    for i, part in enumerate(found):
        assert np.array_equal(part, wanted[i:])


@level
def test_every_length(bits, level):
    for source, destination in PAIRS:
        values = bits[source][::-97][:40]
        whole = cast(values, source, destination, level)
        for length in range(40):
            part = cast(values[:length], source, destination, level)
            assert np.array_equal(part, whole[:length])


def run_with_simd(name):
    code = "from nanotron_fast import _C; print(_C.cast(b'\\x80\\x3f', 0, 2).hex())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NANOTRON_FAST_SIMD": name},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", [*LEVELS, ""])
def test_environment_forces_a_level(name):
    done = run_with_simd(name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0000803f"


def test_environment_rejects_an_unknown_level():
    done = run_with_simd("sse9")
    assert done.returncode != 0
    assert f"ValueError: SIMD level 'sse9': this processor has {', '.join(LEVELS)}" in done.stderr


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="SIMD level 'sse9'"):
        _C.cast(b"", 0, 2, simd="sse9")
    for source, destination in [(0, 3), (3, 2), (1, 1), (-1, 0), (0, 4)]:
        with pytest.raises(ValueError, match="no cast between these dtype codes"):
            _C.cast(b"", source, destination)
    with pytest.raises(ValueError, match="whole elements"):
        _C.cast(b"abc", Dtype.F32, Dtype.BF16)
