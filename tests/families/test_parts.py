"""Parts that several axes of the topology cut, and rotary ranges within a head, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from nanotron_fast.errors import TopologyError, UnsupportedModelError
from nanotron_fast.families.parts import Address, Cut, Param, Part, Share
from nanotron_fast.families.rules import Context, Fuse, StackExperts

SIZES = {"hidden": 6, "heads": 4, "head_dim": 10, "first": 2, "end": 8, "experts": 4, "inter": 8}


def context(*, interleaved: bool = False) -> Context:
    return Context(SIZES, frozenset(), interleaved, interleaved, 0)


def view(data: np.ndarray, share: Share) -> np.ndarray:
    """The elements of a share in a flat array."""
    size = [high - low for low, high in zip(share.low, share.high, strict=True)]
    strides = [stride * data.itemsize for stride in share.strides]
    return np.lib.stride_tricks.as_strided(data.reshape(-1)[share.offset :], size, strides)


def by_expert() -> Param:
    """(experts, in, out) of an MLP's way up: tp cuts out."""
    shape = (4, 6, 8)
    parts = tuple(
        Part(
            tensors=(Address(f"expert.{expert}", (8, 6), (0, 0), (1, 0, 0), (1, 1, 0)),),
            param=Address("up", shape, (expert, 0, 0), (1, 2, 0), (1, 1, 0)),
            sizes=(6, 8, 1),
            cuts={"tp": Cut(1, "columns")},
        )
        for expert in range(4)
    )
    return Param("up", shape, parts, 0, cuts={"tp": 2})


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("ep", [1, 2, 3])
def test_two_axes_cut_two_dimensions(tp: int, ep: int) -> None:
    whole = np.arange(6 * 12 * 8).reshape(6, 12, 8)
    address = Address("x", whole.shape, (0, 0, 0), (0, 1, 2), (1, 1, 1))
    part = Part(
        tensors=(address,),
        param=address,
        sizes=(6, 12, 8),
        cuts={"ep": Cut(0, "experts"), "tp": Cut(2, "columns")},
    )
    param = Param("x", whole.shape, (part,), 0, cuts={"ep": 0, "tp": 2})
    sizes = {"tp": tp, "ep": ep, "pp": 5}
    assert param.local_shape(sizes) == (6 // ep, 12, 8 // tp)
    shards = list(param.shards(sizes))
    assert len(shards) == ep * tp
    # One rank has all experts, and no file speaks of it.
    assert shards[-1] == ({"ep": ep - 1} if ep > 1 else {}) | {"tp": tp - 1}
    for ranks in shards:
        rows, columns = 6 // ep, 8 // tp
        first, left = ranks.get("ep", 0) * rows, ranks["tp"] * columns
        local = np.ascontiguousarray(whole[first : first + rows, :, left : left + columns])
        share = param.share(part, sizes, ranks)
        (a, b, c), (d, e, f) = share.low, share.high
        assert np.array_equal(view(local, share), whole[a:d, b:e, c:f])


def test_an_axis_that_does_not_divide() -> None:
    with pytest.raises(TopologyError, match=r"up: 8 columns do not split over tp=3"):
        by_expert().local_shape({"tp": 3})


def test_an_axis_that_is_not_named_has_one_rank() -> None:
    assert by_expert().local_shape({}) == (4, 6, 8)
    assert list(by_expert().shards({})) == [{"tp": 0}]


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotary_range_within_a_head(interleaved: bool) -> None:
    """Rows 2 to 8 of a head of 10 are turned: those alone are laid out in another order."""
    rule = Fuse(
        ("q", "v"),
        "qv",
        rows=(("heads", "head_dim"), ("heads", "head_dim")),
        columns="hidden",
        rotary=(("first", "end"), None),
    )
    param = rule.expand("qv", context(interleaved=interleaved))
    q, v = np.arange(2 * 40 * 6).reshape(2, 40, 6)
    heads = q.reshape(4, 10, 6)
    turned = heads[:, 2:8].reshape(4, 2, 3, 6).swapaxes(1, 2).reshape(4, 6, 6)
    middle = turned if interleaved else heads[:, 2:8]
    expected = np.concatenate((heads[:, :2], middle, heads[:, 8:]), axis=1).reshape(40, 6)
    found = np.full(param.shape, -1)
    for part in param.parts:
        source = {"q": q, "v": v}[part.name]
        target = view(found, param.share(part, {}, {}))
        target[:] = view(np.ascontiguousarray(source), part.whole(part.tensors[0]))
    assert np.array_equal(found, np.concatenate((expected, v)))
    assert len(param.parts) == (5 if interleaved else 2)


def test_an_odd_rotary_range() -> None:
    rule = Fuse(("q",), "q", rows=(("heads", "head_dim"),), rotary=(("first", "head_dim"),))
    odd = Context({**SIZES, "first": 1}, frozenset(), True, True, 0)
    with pytest.raises(UnsupportedModelError, match="heads of 9 rows have no rotary pairs"):
        rule.expand("q", odd)


def test_a_stack_is_read_from_either_place() -> None:
    rule = StackExperts(("e.{expert}.gate", "e.{expert}.up"), "gate_up", "p", "inter", "hidden")
    param = rule.expand("p", context())
    stacked = np.arange(4 * 16 * 6).reshape(4, 16, 6)
    found = np.full(param.shape, -1)
    for part in param.parts:
        assert [address.name for address in part.tensors][1] == "gate_up"
        target = view(found, param.share(part, {}, {}))
        target[:] = view(stacked, part.whole(part.tensors[1]))
    assert np.array_equal(found, stacked.swapaxes(1, 2))
