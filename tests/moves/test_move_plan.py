"""MovePlan.check and MovePlan.share on random plans."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_fast.errors import PlanError
from nanotron_fast.moves.checksums import Checksum
from nanotron_fast.moves.cuts import within
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.moves.row import FILL
from tests.plans import builders, small_cuts
from tests.strides import permuted

FOLDER = Path("anywhere")


def rejected(plan):
    """The message with which check() rejects a plan."""
    with pytest.raises(PlanError) as caught:
        plan.check()
    return str(caught.value)


@settings(deadline=None)
@given(builders(), st.data())
def test_check_accepts_what_tiles_and_nothing_else(build, data):
    plan = build.plan(FOLDER)
    plan.check()
    index = data.draw(st.integers(0, len(plan.moves) - 1))
    move = plan.moves[index]
    path = plan.outputs[move.destination].path
    before, behind = plan.moves[:index], plan.moves[index + 1 :]
    assert path in rejected(replace(plan, moves=before + behind))
    assert path in rejected(replace(plan, moves=(*plan.moves, move)))

    def changed(**changes):
        return replace(plan, moves=(*before, replace(move, **changes), *behind))

    for shift in (-1, 1, move.destination_dtype.itemsize):
        assert path in rejected(changed(destination_offset=move.destination_offset + shift))
    for dim in range(3):
        longer = tuple(size + (i == dim) for i, size in enumerate(move.sizes))
        assert path in rejected(changed(sizes=longer))
    elsewhere = (move.destination + 1) % len(plan.outputs)
    rejected(changed(destination=elsewhere))


@st.composite
def partitions(draw, low, high, depth=4):
    """A box cut in two, and these again, anywhere: boxes beside each other of any sizes."""
    dims = [dim for dim in range(3) if high[dim] - low[dim] > 1]
    if not dims or not depth or draw(st.integers(0, 3)) == 0:
        return [(low, high)]
    dim = draw(st.sampled_from(dims))
    at = draw(st.integers(low[dim] + 1, high[dim] - 1))
    end, start = list(high), list(low)
    end[dim] = start[dim] = at
    first = draw(partitions(low, tuple(end), depth - 1))
    return first + draw(partitions(tuple(start), high, depth - 1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_check_accepts_any_boxes_that_make_up_a_tensor(data):
    shape = tuple(data.draw(st.integers(1, 6)) for _ in range(3))
    strides = permuted(shape, data.draw(st.permutations(range(3))))
    moves = [
        Move(
            source=FILL,
            source_offset=0,
            destination=0,
            destination_offset=4 + 2 * sum(i * s for i, s in zip(low, strides, strict=True)),
            sizes=tuple(b - a for a, b in zip(low, high, strict=True)),
            source_strides=(0, 0, 0),
            destination_strides=strides,
            source_dtype=Dtype.BF16,
            destination_dtype=Dtype.BF16,
        )
        for low, high in data.draw(partitions((0, 0, 0), shape))
    ]
    output = OutputFile("name", b"head", 4 + 2 * math.prod(shape))
    plan = MovePlan((), (output,), tuple(moves))
    plan.check()
    index = data.draw(st.integers(0, len(moves) - 1))
    others = moves[:index] + moves[index + 1 :]
    rejected(replace(plan, moves=tuple(others)))
    rejected(replace(plan, moves=(*moves, moves[index])))
    for shift in (-2, -1, 1, 2):
        moved = replace(moves[index], destination_offset=moves[index].destination_offset + shift)
        rejected(replace(plan, moves=(*others, moved)))


@pytest.mark.parametrize("grown", [-1, 1])
def test_check_holds_the_size_of_a_file(grown):
    output = OutputFile("folder/name", b"head", 4 + 12 + grown)
    move = Move(0, 0, 0, 4, (6, 1, 1), (1, 1, 1), (1, 1, 1), Dtype.BF16, Dtype.BF16)
    assert "folder/name" in rejected(MovePlan((FOLDER,), (output,), (move,)))


@pytest.mark.parametrize("behind", [0, 2, 100])
def test_check_finds_moves_behind_the_end(behind):
    move = Move(FILL, 0, 0, 0, (6, 1, 1), (0, 0, 0), (1, 1, 1), Dtype.BF16, Dtype.BF16)
    extra = replace(move, destination_offset=12 + behind)
    assert "behind the end at 12" in rejected(
        MovePlan((), (OutputFile("name", b"", 12),), (move, extra))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (0, 3, 2)}, "name: a move of size 0"),
        ({"destination_strides": (0, 2, 1)}, "name: a move of size 2 and stride 0"),
        ({"destination_strides": (6, -2, 1)}, "name: a move of size 3 and stride -2"),
        ({"destination_strides": (3, 1, 2)}, "name: "),
        ({"destination_strides": (6, 2, 2)}, "name: "),
        ({"destination": -1}, "a move writes to file -1 of 1"),
        ({"destination": 1}, "a move writes to file 1 of 1"),
    ],
)
def test_check_rejects_nonsense(changes, message):
    move = Move(0, 0, 0, 0, (2, 3, 2), (6, 2, 1), (6, 2, 1), Dtype.F32, Dtype.F32)
    plan = MovePlan((FOLDER,), (OutputFile("name", b"", 48),), (move,))
    plan.check()
    assert message in rejected(replace(plan, moves=(replace(move, **changes),)))


@settings(deadline=None)
@given(builders(), st.integers(1, 7))
def test_shares_cover_every_output_once(build, world_size):
    plan = build.plan(FOLDER)
    shares = [plan.share(rank, world_size) for rank in range(world_size)]
    outputs = [output for share in shares for output in share.outputs]
    assert sorted(outputs, key=lambda output: output.path) == list(plan.outputs)
    assert sum(len(share.moves) for share in shares) == len(plan.moves)
    assert sum(share.bytes_read for share in shares) == plan.bytes_read
    assert sum(share.bytes_written for share in shares) == plan.bytes_written
    for share in shares:
        share.check()
        assert share.sources == plan.sources


def parts_by_path(plans):
    """The parts of each output, whole ones too, in the order of their bytes; header bytes."""
    parts, header_bytes = {}, {}
    for output in (output for plan in plans for output in plan.outputs):
        parts.setdefault(output.path, []).append(output.part or (0, output.size_bytes))
        header_bytes[output.path] = header_bytes.get(output.path, 0) + len(output.header)
    return {path: sorted(each) for path, each in parts.items()}, header_bytes


@settings(deadline=None)
@given(st.one_of(builders(), builders(aligned=True)), st.integers(1, 9))
def test_shares_with_cuts_cover_every_byte_once(build, world_size):
    plan = build.plan(FOLDER)
    with small_cuts():
        shares = [plan.share(rank, world_size, cuts=True) for rank in range(world_size)]
    for share in shares:
        share.check()
        assert len({output.path for output in share.outputs}) == len(share.outputs)
    parts, header_bytes = parts_by_path(shares)
    assert sorted(parts) == [output.path for output in plan.outputs]
    for output in plan.outputs:
        assert header_bytes[output.path] == len(output.header)
        ends = [0, *(end for _, end in parts[output.path])]
        assert [begin for begin, _ in parts[output.path]] == ends[:-1]
        assert ends[-1] == output.size_bytes
    assert sum(share.bytes_read for share in shares) == plan.bytes_read
    assert sum(share.bytes_written for share in shares) == plan.bytes_written


def file_of(num_bytes, path="file", **changes):
    """A plan of one file of zeros."""
    sizes = (num_bytes // 2, 1, 1)
    move = Move(FILL, 0, 0, 0, sizes, (0, 0, 0), (1, 1, 1), Dtype.BF16, Dtype.BF16)
    return MovePlan((), (replace(OutputFile(path, b"", num_bytes), **changes),), (move,))


def test_a_file_is_cut_at_multiples_alone():
    with small_cuts(64):
        shares = [file_of(1000).share(rank, 3, cuts=True) for rank in range(3)]
    (parts, _) = parts_by_path(shares)
    assert parts["file"] == [(0, 384), (384, 768), (768, 1000)]
    for share in shares:
        share.check()


@pytest.mark.parametrize(
    "changes",
    [
        {"literals": ((996, b"tail"),)},
        {"checksums": (Checksum(0, 990, (990,)),)},
        {"header": bytes(65)},
    ],
)
def test_files_that_are_not_cut(changes):
    with small_cuts(64):
        shares = [file_of(1000, **changes).share(rank, 3, cuts=True) for rank in range(3)]
    assert sorted(len(share.outputs) for share in shares) == [0, 0, 1]


def test_check_finds_what_is_wrong_with_a_part():
    plan = file_of(1000)
    part = replace(plan.outputs[0], part=(200, 1000))
    assert "byte 0" in rejected(replace(plan, outputs=(part,)))
    (move,) = plan.moves
    (here,) = within(move, 200, 900)
    assert "nothing writes byte 900" in rejected(replace(plan, outputs=(part,), moves=(here,)))
    part = replace(part, part=(200, 800))
    assert "past byte 800" in rejected(replace(plan, outputs=(part,), moves=(here,)))
