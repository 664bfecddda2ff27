"""When a group's products run over symmetric memory: on several ranks, and in every branch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nanotron_fast.parallel import symmetric
from nanotron_fast.parallel.symmetric import obstacle
from tests.parallel.ranks import run_ranks
from tests.parallel.stand_ins import facts


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_decide_alike(size: int) -> None:
    run_ranks("tests.parallel.symmetric_ranks", size)


def of_ranks(*others: dict[str, object]) -> list[symmetric.Facts]:
    return [facts(rank, len(others), **said) for rank, said in enumerate(others)]


@pytest.mark.parametrize(
    ("ranks", "why"),
    [
        (of_ranks({}, {}, {}), None),
        (of_ranks({}, {"obstacle": "tensors are on cpu"}), "rank 1: tensors are on cpu"),
        (of_ranks({}, {"host": "other"}), "several hosts"),
        (of_ranks({"number": 1}, {}), "CUDA_VISIBLE_DEVICES"),
        (
            of_ranks({}, {}, {"reached": frozenset({"device 2", "device 1"})}),
            "rank 2 does not reach that of rank 0",
        ),
        # Whoever enabled it for the group knows of ways between hosts.
        (of_ranks({"was_enabled": True, "host": "a"}, {"was_enabled": True}), None),
        (of_ranks({"was_enabled": True, "host": "a"}, {}), "several hosts"),
        (of_ranks({"was_enabled": True, "obstacle": "old"}, {"was_enabled": True}), "old"),
    ],
)
def test_what_stands_against_it(ranks, why) -> None:
    found = obstacle(ranks)
    assert found is None if why is None else why in found


class _Group:
    group_name = "some group"


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs that reach each other, and a third that none does."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} == {0, 1})
    properties = [SimpleNamespace(uuid=f"GPU-{i}") for i in range(3)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")


def test_facts_of_a_gpu(two_gpus, monkeypatch) -> None:
    monkeypatch.setenv(symmetric.ENVIRONMENT_VARIABLE, "1")
    found = symmetric._facts(torch.device("cuda", 1), _Group())
    assert found == ("1", None, False, symmetric._host(), "GPU-1", 1, {"GPU-0", "GPU-1"})
    alone = symmetric._facts(torch.device("cuda", 2), _Group())
    assert alone.reached == {"GPU-2"}


def test_facts_that_stand_against_it(two_gpus, monkeypatch) -> None:
    device = torch.device("cuda", 0)

    def why() -> str | None:
        return symmetric._facts(device, _Group()).obstacle

    assert why() is None
    with monkeypatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:gloo")
        assert why() == "the group's backend is cpu:gloo,cuda:gloo"
    with monkeypatch.context() as patch:
        patch.setattr(symmetric, "_OPERATORS", ("fused_all_gather_matmul", "of_a_later_torch"))
        assert why() == f"torch {torch.__version__} has no symm_mem.of_a_later_torch"

    def broken(number: int) -> object:
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert why() == "RuntimeError: no driver"


def test_ranks_agree_on_the_device_of_their_tensors(monkeypatch) -> None:
    """A process that has set no current device has its tensors on another one."""
    current = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    group = _Group()
    monkeypatch.setattr(dist.distributed_c10d, "_resolve_process_group", lambda name: group)
    monkeypatch.setattr(symmetric, "is_capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(symmetric, "_agree", lambda device, _: current == [device])
    assert symmetric.is_used(torch.device("cuda", 1), SimpleNamespace(name="some group"))
    assert not symmetric.is_used(torch.device("cpu"), SimpleNamespace(name="some group"))
