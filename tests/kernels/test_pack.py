"""The packer on every path it can take, byte for byte against the numpy reference."""

from __future__ import annotations

import array
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanotron_fast.errors import PlanError
from nanotron_fast.kernels import pack
from nanotron_fast.kernels.pack import item, operators
from nanotron_fast.kernels.pack.table import DTYPES
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move, table_of
from nanotron_fast.moves.row import FILL
from tests.kernels.packing import PATHS, check, choose_path, gpu, no_gpu, random_bytes, run_bytes
from tests.strides import permuted

_C = pytest.importorskip("nanotron_fast._C", reason="the native code is not built")

TORCH = dict(zip(Dtype, DTYPES, strict=True))
CASTABLE = (Dtype.BF16, Dtype.F16, Dtype.F32)
CASTS = [(a, b) for a in CASTABLE for b in CASTABLE if a is not b]
PAIRS = [*((dtype, dtype) for dtype in Dtype), *CASTS]
names = {"ids": lambda value: getattr(value, "name", None)}
# The interpreter adds signalling NaN, and numpy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(params=PATHS)
def place(request, monkeypatch) -> torch.device:
    return choose_path(request.param, monkeypatch)


def span(sizes, strides, dtype):
    return dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)))


def check_move(sizes, strides, order, dtypes, device, shifts=(0, 0)):
    """One move to a box that lies with its dimensions in some order."""
    to = permuted(sizes, order)
    move = Move(0, shifts[0], 0, shifts[1], sizes, strides, to, *dtypes)
    source = random_bytes(shifts[0] + span(sizes, strides, dtypes[0]))
    check([move], [source], [shifts[1] + span(sizes, to, dtypes[1]) + 3], device)


def patterns(dtype):
    """All bits of 16; of 32 each sign and exponent with what rounds up, down, and to even."""
    if dtype is not Dtype.F32:
        return np.arange(65536, dtype=np.uint16)
    high = np.arange(512, dtype=np.uint32)[:, None] << 23
    units = np.array([0, *(1 << np.arange(23))], np.uint32)
    near = np.concatenate([units, units + 1, units - 1, 3 * units]) & 0x7F_FFFF
    return (high | near).ravel()


@pytest.mark.parametrize(("source", "destination"), CASTS, **names)
def test_casts_of_every_pattern(place, source, destination) -> None:
    values = patterns(source)
    sizes = (len(values), 1, 1)
    move = Move(0, 0, 0, 0, sizes, (1, 1, 1), (1, 1, 1), source, destination)
    check([move], [values.view(np.uint8)], [len(values) * destination.itemsize], place)
    # Element by element, where the vectors of the other way do not fit.
    count = min(len(values), 5000)
    sizes, strides = (count // 7, 7, 1), (1, count // 7, 1)
    wide = (9, 1, 1)
    move = Move(0, 0, 0, 1, sizes, strides, wide, source, destination)
    num_bytes = 1 + span(sizes, wide, destination)
    check([move], [values[-count:].copy().view(np.uint8)], [num_bytes], place)


@pytest.mark.parametrize("shifts", [(0, 0), (2, 2), (1, 0), (0, 3), (8, 16), (5, 9)])
@pytest.mark.parametrize("dtypes", [PAIRS[0], PAIRS[3], (Dtype.F32, Dtype.BF16)], **names)
def test_offsets_that_are_odd(place, dtypes, shifts) -> None:
    check_move((1, 1, 1001), (1, 1, 1), (0, 1, 2), dtypes, place, shifts)
    check_move((1, 9, 24), (1, 40, 1), (0, 1, 2), dtypes, place, shifts)
    check_move((3, 5, 7), (70, 9, 1), (0, 1, 2), dtypes, place, shifts)
    check_move((1, 20, 30), (1, 1, 20), (0, 1, 2), dtypes, place, shifts)


@pytest.mark.parametrize("dtypes", PAIRS, **names)
def test_transposed_matrices(place, dtypes) -> None:
    check_move((70, 130, 1), (1, 70, 1), (0, 1, 2), dtypes, place)
    check_move((3, 33, 35), (33 * 35, 1, 33), (0, 1, 2), dtypes, place)
    # In the source a dimension lies between the two.
    check_move((12, 3, 20), (1, 12, 36), (0, 1, 2), dtypes, place)


def test_more_than_one_tile(place) -> None:
    bf16 = (Dtype.BF16, Dtype.BF16)
    check_move((1, 1, 40_001), (1, 1, 1), (0, 1, 2), bf16, place)
    check_move((1, 100, 512), (1, 4096, 1), (0, 1, 2), bf16, place)
    check_move((1, 3, 9000), (1, 9001, 1), (0, 1, 2), bf16, place)
    check_move((1, 3, 9000), (1, 9008, 1), (0, 1, 2), (Dtype.BF16, Dtype.F32), place)


def test_zeros_and_nothing_beside_them(place) -> None:
    bf16, fp32 = Dtype.BF16, Dtype.F32
    moves = [
        Move(FILL, 0, 0, 5, (1, 1, 6001), (0, 0, 0), (1, 1, 1), bf16, bf16),
        Move(FILL, 0, 1, 4, (1, 30, 40), (0, 0, 0), (1, 48, 1), fp32, fp32),
        Move(FILL, 0, 2, 1, (1, 7, 11), (0, 0, 0), (1, 1, 17), fp32, bf16),
    ]
    check(moves, [], [12_010, 6000, 400], place)


def test_many_moves_in_one_launch(place) -> None:
    sizes = [1 + 13 * i % 37 for i in range(70)]
    moves, at = [], 0
    for i, size in enumerate(sizes):
        wide = (size, 1, 1)
        moves.append(Move(i % 3, 0, i % 2, at, wide, (1,) * 3, (1,) * 3, Dtype.F16, Dtype.F16))
        at += 2 * size
    check(moves, [random_bytes(80, seed) for seed in range(3)], [at, at], place)


def test_tables_of_every_kind(place) -> None:
    move = Move(0, 4, 0, 2, (3, 2, 1), (2, 1, 1), (1, 3, 1), Dtype.F32, Dtype.F16)
    table = table_of([move, replace(move, destination=1)])
    source = random_bytes(28)
    expected = run_bytes([move, replace(move, destination=1)], [source], [14, 14], place)
    assert not (expected[0] == 7).all()
    flat = torch.tensor(table.tolist())
    kinds = (
        table,
        np.array(table),
        flat,
        flat.view(2, 16),
        iter([move]),
        np.array(table[:16]),
    )
    for moves in kinds:
        found = run_bytes(moves, [source], [14, 14], place)
        assert np.array_equal(found[0], expected[0])
    for moves in ([], array.array("q"), torch.empty(0, 16, dtype=torch.int64)):
        assert (run_bytes(moves, [source], [9], place)[0] == 7).all()
        pack.run(moves, [], [])


def test_what_does_not_fit_is_named_and_nothing_is_written(place) -> None:
    move = Move(0, 0, 0, 0, (4, 1, 1), (1, 1, 1), (1, 1, 1), Dtype.BF16, Dtype.BF16)
    source = torch.zeros(8, dtype=torch.uint8, device=place)
    written = torch.full((8,), 7, dtype=torch.uint8, device=place)
    for bad, message in (
        ({"destination_offset": 2}, "move 1: destination ends at byte 10 of a file of 8"),
        ({"source": 1}, "move 1: source file 1 is not one of 1"),
        ({"source_strides": (3, 1, 1)}, "move 1: source ends at byte 20 of a file of 8"),
        ({"sizes": (0, 1, 1)}, "move 1: size 0"),
        ({"source_dtype": Dtype.F64, "sizes": (1, 1, 1)}, "move 1: no cast between its dtypes"),
    ):
        with pytest.raises(PlanError, match=message):
            pack.run([move, replace(move, **bad)], [source], [written])
    with pytest.raises(PlanError, match="move 0: destination file 0 is not one of 0"):
        pack.run([move], [source], [])
    assert (written == 7).all()
    with pytest.raises(ValueError, match=r"source 0 \(4, 2\) is not contiguous: its strides"):
        pack.run([move], [source.view(2, 4).t()], [written])
    with pytest.raises(ValueError, match=r"tensors on .*, meta"):
        pack.run([move], [source], [torch.empty(8, device="meta")])
    with pytest.raises(ValueError, match=r"with 16 columns, not torch.int32 \(3,\) on cpu"):
        pack.run(torch.zeros(3, dtype=torch.int32), [source], [written])
    with pytest.raises(ValueError, match="is int64, not 'i'"):
        pack.run(array.array("i", [0] * 15), [source], [written])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_packed_projections(place, tp) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, 12, device=place).bfloat16() for rows in (64, 16, 16))
    shards = pack.pack_qkv(q, k, v, tp)
    for rank, packed in enumerate(shards):
        parts = [t.chunk(tp)[rank] for t in (q, k, v)]
        assert torch.equal(packed, torch.cat(parts))
    assert torch.equal(pack.pack_qkv(q, k, v, tp, rank=tp - 1), shards[-1])
    wide = pack.pack_qkv(q[:, 0], k[:, 0], v[:, 0], tp, rank=0, dtype=torch.float32)
    assert torch.equal(wide, shards[0][:, 0].float())
    for ours, theirs in zip(pack.unpack_qkv(shards, 8, 2), (q, k, v), strict=True):
        assert torch.equal(ours, theirs)
    shards = pack.pack_gate_up(k, v, tp)
    assert torch.equal(shards[0], torch.cat([k.chunk(tp)[0], v.chunk(tp)[0]]))
    for ours, theirs in zip(pack.unpack_gate_up(shards), (k, v), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("dim", "chunks"), [(0, None), (1, None), (-1, (4, 12)), (2, (8, 0, 8))])
def test_sharding_and_merging(place, dim, chunks) -> None:
    tensor = torch.arange(8 * 12 * 16, device=place).view(8, 12, 16).to(torch.float16)
    shards = pack.shard(tensor, dim, 4, chunks=chunks)
    pieces = tensor.split(chunks or [tensor.shape[dim]], dim)
    for rank, ours in enumerate(shards):
        theirs = torch.cat([piece.chunk(4, dim)[rank] for piece in pieces if piece.numel()], dim)
        assert torch.equal(ours, theirs)
    assert torch.equal(pack.merge(shards, dim, chunks=chunks), tensor)
    strided = pack.shard(tensor.transpose(0, 2), 0, 2, rank=1, dtype=torch.float32)
    assert torch.equal(strided, tensor.transpose(0, 2)[8:].float())


def test_empty_tensors_are_packed(place) -> None:
    empty = torch.empty(0, 8, device=place)
    assert [tuple(t.shape) for t in pack.pack_gate_up(empty, empty, 2)] == [(0, 8), (0, 8)]
    assert pack.merge([torch.empty(4, 0, device=place)] * 2, 0).shape == (8, 0)


def test_shapes_that_do_not_pack_are_named() -> None:
    q, k = torch.empty(6, 4), torch.empty(3, 4)
    with pytest.raises(ValueError, match="pack_qkv: chunk 1 of 3 does not split over tp=2"):
        pack.pack_qkv(q, k, k, 2)
    with pytest.raises(ValueError, match=r"pack_qkv: \(3, 5\) torch.float32 beside \(6, 4\)"):
        pack.pack_qkv(q, k, torch.empty(3, 5))
    with pytest.raises(ValueError, match=r"pack_gate_up: .*torch.float16 beside"):
        pack.pack_gate_up(k, k.half())
    with pytest.raises(ValueError, match="shard: rank 2 of tp=2"):
        pack.shard(q, 0, 2, rank=2)
    with pytest.raises(ValueError, match=r"shard: chunks \(2, 3\) add up to 5, not 6"):
        pack.shard(q, 0, 1, chunks=(2, 3))
    with pytest.raises(ValueError, match=r"torch.int32 to torch.int32 is not one of its casts"):
        pack.shard(q.int(), 0, 2)
    with pytest.raises(ValueError, match=r"torch.float32 to torch.float64 is not"):
        pack.shard(q, 0, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="unpack_qkv: 6 rows are not those of 4 heads"):
        pack.unpack_qkv(q, 2, 1)
    for heads in ((0, 0), (-2, 2), (6, 0)):
        with pytest.raises(ValueError, match="unpack_qkv: 6 rows are not those of"):
            pack.unpack_qkv(q, *heads)
    with pytest.raises(ValueError, match=r"merge: .*\(3, 4\) torch.float32 beside|a shard"):
        pack.merge([q, k], 0)


def test_writes_into_parameters_and_tells_autograd(place) -> None:
    source = torch.randn(6, device=place, requires_grad=True)
    parameter = torch.nn.Parameter(torch.zeros(6, device=place))
    version = parameter._version
    move = Move(0, 0, 0, 0, (6, 1, 1), (1, 1, 1), (1, 1, 1), Dtype.F32, Dtype.F32)
    pack.run([move], [source], [parameter])
    assert torch.equal(parameter, source)
    assert parameter._version > version
    assert not pack.shard(source, 0, 2)[0].requires_grad


def test_operator_is_what_torch_expects(place) -> None:
    move = Move(0, 0, 0, 8, (4, 1, 1), (1, 1, 1), (1, 1, 1), Dtype.F32, Dtype.F32)
    table = torch.tensor(table_of([move])).view(1, 16)
    tensors = [torch.randn(4, device=place)], [torch.zeros(8, device=place)]
    torch.library.opcheck(operators.pack.overload, (table, *tensors))


def test_compiles_without_a_graph_break(place) -> None:
    q, k = torch.randn(8, 6, device=place), torch.randn(4, 6, device=place)

    def function(q, k):
        shards = pack.pack_qkv(2 * q, k, k + 1, 2)
        return (*shards, *pack.unpack_qkv(shards, 2, 1))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(q, k), function(q, k), strict=True):
        assert torch.equal(ours, theirs)


def test_says_which_path_it_takes(monkeypatch) -> None:
    cpu = torch.device("cpu")
    assert pack.explain("cpu") == pack.explain(cpu) == ("cpu", "native code")
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "torch")
    assert pack.explain(cpu) == ("torch", "NANOTRON_FAST_BACKEND=torch")
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "auto")
    monkeypatch.setattr(pack.choice, "_cuda_problem", lambda index: "built without CUDA")
    path, why = pack.explain(torch.device("cuda", 0))
    assert path == "triton"
    assert why.endswith("; built without CUDA")


def test_imports_nothing_of_the_converter() -> None:
    code = (
        "import sys, nanotron_fast.kernels.pack\n"
        "found = [m for m in sys.modules if m.startswith('nanotron_fast.')]\n"
        "allowed = ('nanotron_fast.moves', 'nanotron_fast.moves.row')\n"
        "shared = ('kernels', 'version', 'extras', 'errors')\n"
        "others = [m for m in found if m.split('.')[1] not in shared]\n"
        "assert set(others) <= set(allowed), others"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_items_have_the_columns_that_the_native_code_gives_them() -> None:
    assert {name: getattr(item, name) for name in _C.TILE_COLUMNS} == _C.TILE_COLUMNS


def test_extension_is_imported_without_a_driver() -> None:
    _cuda = pytest.importorskip("nanotron_fast._cuda", reason="built without CUDA")
    assert list(_cuda.ARCHITECTURES) == sorted(set(_cuda.ARCHITECTURES))
    if not torch.cuda.is_available():
        assert _cuda.problem_of(0)
        with pytest.raises(RuntimeError, match="cudaSetDevice: "):
            _cuda.launch_inline(bytes(128), num_tiles=1, device=0, stream=0)
    with pytest.raises(ValueError, match="129 bytes are not up to 31 items of 128"):
        _cuda.launch_inline(bytes(129), num_tiles=1, device=0, stream=0)


@gpu
@no_gpu
def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    device = torch.device("cuda", 0)
    if pack.explain(device)[0] != "cuda":
        pytest.skip(pack.explain(device)[1])
    q, k = torch.randn(4096, 512, device=device), torch.randn(1024, 512, device=device)
    expected = torch.cat([q[2048:], k[512:], k[512:]])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        q += 1
        packed = pack.pack_qkv(q, k, k, 2, rank=1)
    side.synchronize()
    expected[:2048] += 1
    assert torch.equal(packed, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = pack.pack_qkv(q, k, k, 2, rank=1)
    q.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert not packed[:2048].any()
