"""Which path an operation takes: our Triton kernels, or plain torch.

The environment variable NANOTRON_FAST_BACKEND decides:

- ``auto`` (the default): Triton for tensors on a GPU, torch for all others;
- ``triton``: Triton for every tensor; on the CPU this needs Triton's interpreter, which
  TRITON_INTERPRET=1 turns on if it is set before Triton is first imported;
- ``torch``: plain torch for every tensor, the references that the kernels are tested against.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

try:
    import triton
except ImportError:  # macOS and Windows have no Triton
    triton = None

ENVIRONMENT_VARIABLE = "NANOTRON_FAST_BACKEND"
BACKENDS = ("auto", "triton", "torch")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_in_a_graph(function: _Function) -> _Function:
    """Lets torch.compile call a function while it traces, and keep what it gave.

    It is what torch.compiler.assume_constant_result does, which imports all of torch.compile for
    it: 4 s of CPU at the start of a process, most of which never compile.
    """
    function._dynamo_marked_constant = True
    return function


# torch.compile keeps what it reads while it traces: the choice is made once per compiled graph.
@constant_in_a_graph
def requested_backend() -> str:
    """What NANOTRON_FAST_BACKEND asks for. Raises ValueError for a value that is none of them."""
    backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={backend}: choose {', '.join(BACKENDS)}")
    return backend


@constant_in_a_graph
def is_interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's interpreter."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def interprets_products(dtype: torch.dtype) -> bool:
    """Whether Triton's interpreter multiplies matrices of a dtype.

    It keeps bf16 as whole numbers of 16 bits, and tl.dot multiplies those.
    """
    return dtype != torch.bfloat16


def multiplies(tensor: torch.Tensor) -> bool:
    """`uses_triton` for kernels with a matrix product."""
    return uses_triton(tensor) and (interprets_products(tensor.dtype) or not is_interpreting())


def explain(device_type: str) -> tuple[str, str]:
    """The path, "triton" or "torch", that tensors of a device take, and why, for people."""
    backend = requested_backend()
    if backend == "torch":
        return "torch", f"{ENVIRONMENT_VARIABLE}=torch"
    if triton is None:
        return "torch", "Triton is not installed"
    if backend == "triton":
        how = "interpreted" if is_interpreting() else "compiled"
        return "triton", f"{ENVIRONMENT_VARIABLE}=triton, {how}"
    if device_type == "cuda":
        return "triton", "compiled for the GPU"
    return "torch", f"tensors on {device_type}"


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on this tensor launches our kernels.

    Raises RuntimeError where NANOTRON_FAST_BACKEND asks for what is not there.
    """
    backend = requested_backend()
    if backend == "torch":
        return False
    if backend == "auto":
        return triton is not None and tensor.is_cuda
    if triton is None:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}=triton, but Triton is not installed")
    return not tensor.is_meta  # which has nothing to launch on
