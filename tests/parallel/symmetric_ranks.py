"""A rank of test_symmetric.py: what the ranks of a group agree on, whatever single ones say."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nanotron_fast.kernels.runtime.collectives import resolve
from nanotron_fast.parallel import symmetric
from nanotron_fast.parallel.products import gather_linear, linear_scatter
from tests.parallel.ranks import check, join, run_cases, with_chunks
from tests.parallel.stand_ins import facts, fused_products

CPU = torch.device("cpu")


@contextmanager
def ranks_that(fails: str | None = None, mode: str = "auto", **said: object) -> Iterator[list[str]]:
    """All could share memory, but rank 1 says or fails otherwise. The steps that were taken.

    What is agreed on is forgotten before and after. `mode` is all ranks'.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    taken: list[str] = []

    def step(name: str, device: torch.device, group: dist.ProcessGroup) -> None:
        taken.append(name)
        if rank == 1 and fails == name:
            raise OSError(f"no {name}")

    mine = facts(rank, size, **{"mode": mode, **(said if rank == 1 else {})})
    symmetric._agreed.clear()
    with (
        mock.patch.object(symmetric, "_facts", return_value=mine),
        mock.patch.object(symmetric, "_allocate", partial(step, "_allocate")),
        mock.patch.object(symmetric, "_meet", partial(step, "_meet")),
    ):
        yield taken
    symmetric._agreed.clear()


def is_agreed_once(group) -> None:
    with ranks_that() as taken:
        assert symmetric.is_used(CPU, resolve(group))
        assert symmetric.is_used(CPU, resolve(group))
        assert taken == ["_allocate", "_meet"]


def products_take_it(group) -> None:
    """By themselves, and below the threshold nobody asks."""
    ranks = resolve(group)
    x, weight = torch.randn(8, 6).double(), torch.randn(4, 6).double()
    whole = torch.cat([x] * ranks.size)
    with ranks_that() as taken, fused_products() as calls:
        gather_linear(x, weight, None, ranks)
        assert taken == calls == []

        def case() -> None:
            y, gathered, _ = gather_linear(x, weight, None, ranks)
            check(y, whole @ weight.t(), "gathered and multiplied")
            check(gathered, whole, "gathered")
            scattered = linear_scatter(whole, weight, None, ranks)
            check(scattered, ranks.size * x @ weight.t(), "multiplied and scattered")

        with_chunks(case)
        assert taken == ["_allocate", "_meet"]
        assert calls == ["gather", "scatter"]


def is_refused(group, said: dict[str, object]) -> None:
    """By what one rank says; nothing fails, so nothing is warned of."""
    with ranks_that(**said) as taken, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not symmetric.is_used(CPU, resolve(group))
        assert taken == []


def fails(group, step: str, taken_then: list[str]) -> None:
    """A step on one rank: all do without, and say so once."""
    with ranks_that(step) as taken, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert not symmetric.is_used(CPU, resolve(group))
        assert taken == taken_then
    said = [str(each.message) for each in caught]
    assert said == [f"collectives in place of symmetric memory: rank 1: OSError: no {step}"]


def is_an_error(group, kind: type[Exception], message: str, step: str | None, said) -> None:
    """On every rank, whatever they are and say."""
    if said.pop("disagree", False):
        said = {"mode": str(min(dist.get_rank(), 1))}
    with ranks_that(step, **said), pytest.raises(kind, match=re.escape(message)):
        symmetric.is_used(CPU, resolve(group))


def insists(group) -> None:
    with ranks_that(mode="1"):
        assert symmetric.is_used(CPU, resolve(group))


def facts_of_a_cpu(group) -> None:
    """With what this torch and this machine really are."""
    symmetric._agreed.clear()
    with mock.patch.dict(os.environ):
        os.environ.pop(symmetric.ENVIRONMENT_VARIABLE, None)
        mine = symmetric._facts(CPU, group)
        assert (mine.mode, mine.obstacle) == ("auto", "tensors are on cpu")
        assert not symmetric.is_used(CPU, resolve(group))
        symmetric._agreed.clear()
        if dist.get_rank() == 1:
            os.environ[symmetric.ENVIRONMENT_VARIABLE] = "1"
        message = f"{symmetric.ENVIRONMENT_VARIABLE}=1, but rank 0: tensors are on cpu"
        with pytest.raises(RuntimeError, match=message):
            symmetric.is_used(CPU, resolve(group))
    symmetric._agreed.clear()


def never_while_capturing(group) -> None:
    with ranks_that() as taken, mock.patch.object(symmetric, "is_capturing", return_value=True):
        assert not symmetric.is_used(CPU, resolve(group))
        assert taken == []


def never_while_traced(group) -> None:
    ranks = resolve(group)
    with ranks_that() as taken:

        def case() -> None:
            compiled = torch.compile(
                lambda x: x + symmetric.is_used(x.device, ranks), backend="eager", fullgraph=True
            )
            assert compiled(torch.zeros(1)).item() == 0

        with_chunks(case)
        assert taken == []


def cases(group) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "agreed once", partial(is_agreed_once, group)
    yield "products take it", partial(products_take_it, group)
    for said in (
        {"obstacle": "no NCCL"},
        {"host": "another"},
        {"number": 0},
        {"reached": frozenset({"device 1"})},
        {"was_enabled": True, "host": "another"},
    ):
        yield f"refused for {said}", partial(is_refused, group, said)
    yield "refused by a variable", partial(is_refused, group, {"mode": "0"})
    yield "no memory to share", partial(fails, group, "_allocate", ["_allocate"])
    yield "no way to open it", partial(fails, group, "_meet", ["_allocate", "_meet"])
    variable = symmetric.ENVIRONMENT_VARIABLE
    for kind, message, step, said in (
        (ValueError, f"{variable}=2: choose auto, 0, 1", None, {"mode": "2"}),
        (ValueError, "0 on some ranks of a group and 1 on others", None, {"disagree": True}),
        (RuntimeError, "=1, but the ranks are on several", None, {"mode": "1", "host": "another"}),
        (RuntimeError, "=1, but rank 1: OSError: no _meet", "_meet", {"mode": "1"}),
    ):
        yield f"error {message}", partial(is_an_error, group, kind, message, step, said)
    yield "insisting on what can be", partial(insists, group)
    yield "a CPU", partial(facts_of_a_cpu, group)
    yield "capturing", partial(never_while_capturing, group)
    yield "traced", partial(never_while_traced, group)


if __name__ == "__main__":
    group = join()
    run_cases(cases(group))
