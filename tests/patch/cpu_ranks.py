"""A rank of test_cpu.py: the collectives that Nanotron asks nccl for, over gloo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from nanotron_fast.patch.cpu import cpu_mode
from tests.parallel.ranks import join, run_cases

AVERAGE = dist.ReduceOp.AVG
MEAN = 1.5  # of what the two ranks hold


def mine(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, dist.get_rank() + 1, dtype=dtype, device="cuda")


def average(dtype: torch.dtype, is_async: bool) -> None:
    tensor = mine(3, dtype=dtype)
    work = dist.all_reduce(tensor, op=AVERAGE, async_op=is_async)
    if is_async:
        work.get_future().wait()
    assert tensor.tolist() == [MEAN] * 3


def average_of_a_parameter() -> None:
    parameter = torch.nn.Parameter(mine(3))
    dist.all_reduce(parameter, op=AVERAGE)
    assert parameter.requires_grad
    assert parameter.tolist() == [MEAN] * 3


def average_of_several() -> None:
    tensors = [mine(3), mine(2, 2)]
    dist.all_reduce_coalesced(tensors, op=AVERAGE)
    assert all((tensor == MEAN).all() for tensor in tensors)


def scattered(out: tuple[int, ...], source: tuple[int, ...], is_async: bool) -> None:
    """nccl counts elements and does not compare shapes."""
    output = torch.zeros(out, device="cuda")
    work = dist.reduce_scatter_tensor(output, mine(*source), op=AVERAGE, async_op=is_async)
    if is_async:
        work.wait()
    assert (output == MEAN).all()


def scattered_list() -> None:
    output = torch.zeros(2, device="cuda")
    dist.reduce_scatter(output, [mine(2), mine(2)], op=AVERAGE)
    assert output.tolist() == [MEAN] * 2


def exchanged() -> None:
    outputs = [torch.zeros(2, device="cuda") for _ in range(2)]
    dist.all_to_all(outputs, [mine(2), mine(2)])
    assert [tensor.tolist() for tensor in outputs] == [[1, 1], [2, 2]]


def objects() -> None:
    words = [f"rank {dist.get_rank()}"]
    dist.broadcast_object_list(words, src=1, device=torch.device("cuda"))
    assert words == ["rank 1"]


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for is_async in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            yield f"average {dtype} {is_async}", partial(average, dtype, is_async)
        for out, source in (((2, 3), (4, 3)), ((2, 1, 3), (4, 3)), ((2, 3), (2, 2, 3))):
            yield f"scatter {out} {source} {is_async}", partial(scattered, out, source, is_async)
    yield "average of a parameter", average_of_a_parameter
    yield "average of several", average_of_several
    yield "scattered list", scattered_list
    if not torch.__version__.startswith("2.11."):  # whose gloo exchanges one tensor, and no lists
        yield "exchanged", exchanged
    yield "objects", objects


if __name__ == "__main__":
    with cpu_mode():
        join()
        run_cases(cases())
