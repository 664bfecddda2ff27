"""Which implementation of attention a call gets, and why: a table, and one function over it.

| name | what it is |
|---|---|
| flash_attn_3 | the package flash_attn_interface (FlashAttention 3), Hopper alone |
| flash_attn_2 | the package flash_attn, the real one |
| sdpa_cudnn | torch's scaled_dot_product_attention on cuDNN |
| sdpa_flash | the same on the flash kernels that torch brings |
| sdpa_varlen | torch.nn.attention.varlen, those kernels with documents and windows |
| triton | our kernels: every option, fp32 too |
| sdpa_cpu | torch's flash kernels for the CPU: every option but a softcap, every dtype |
| torch | the reference: every option on every device, all scores in memory |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from nanotron_fast.kernels.runtime.backend import interprets_products
from nanotron_fast.kernels.runtime.sizes import next_power_of_2
from nanotron_fast.kernels.runtime.tuning import Tuned

EQUAL, FEWER_QUERIES, MORE_QUERIES = "equal", "fewer queries", "more queries"

# What "auto" tries, fastest first, where nothing was measured: the published order, for head_dim
# 128 on the H100: FlashAttention 3 685 TFLOP/s forward, cuDNN 539, FlashAttention 2 and torch's
# flash kernels 350 to 400; ours last.
PREFERENCE = (
    "flash_attn_3",
    "sdpa_cudnn",
    "flash_attn_2",
    "sdpa_flash",
    "sdpa_varlen",
    "triton",
    "torch",
)
# `backend` -> what may serve it; each name of the table stands for itself too.
GROUPS: dict[str, tuple[str, ...]] = {
    "sdpa": ("sdpa_cudnn", "sdpa_flash", "sdpa_varlen"),
    "flash_attn": ("flash_attn_3", "flash_attn_2"),
}

_HALF = (torch.bfloat16, torch.float16)
# GPUs with 100 KB of shared memory a multiprocessor, where flash backward is short of it.
_SMALL_GPUS = (86, 87, 89, 120, 121)


@dataclass(frozen=True, slots=True)
class Capability:
    """What an implementation can do on a GPU. Architectures are inclusive: 90 is sm_90."""

    architectures: tuple[int, int]
    dtypes: tuple[torch.dtype, ...] = _HALF
    max_head_dim: int = 256
    head_dim_multiple: int = 8
    max_head_dim_in_fp32: int = 256
    max_head_dim_to_train_on_small_gpus: int = 256
    documents: bool = True
    window: bool = True
    softcap: bool = True
    # What it can do under a causal mask that ends at the last key. Where there are more queries
    # than keys, some of them see nothing.
    lengths: tuple[str, ...] = (EQUAL, FEWER_QUERIES, MORE_QUERIES)
    deterministic: bool = True
    # Whether attention_forward and attention_backward can call it.
    lse: bool = False


CAPABILITIES: dict[str, Capability] = {
    "flash_attn_3": Capability((90, 90), lengths=(EQUAL, FEWER_QUERIES), deterministic=False),
    "sdpa_cudnn": Capability(
        (90, 109),
        max_head_dim=128,
        documents=False,
        window=False,
        softcap=False,
        lengths=(EQUAL,),
        deterministic=False,
        lse=True,
    ),
    "flash_attn_2": Capability(
        (80, 121), lengths=(EQUAL, FEWER_QUERIES), max_head_dim_to_train_on_small_gpus=192
    ),
    "sdpa_flash": Capability(
        (80, 121),
        documents=False,
        window=False,
        softcap=False,
        lengths=(EQUAL,),
        max_head_dim_to_train_on_small_gpus=192,
        lse=True,
    ),
    "sdpa_varlen": Capability(
        (80, 121),
        softcap=False,
        lengths=(EQUAL, FEWER_QUERIES),
        max_head_dim_to_train_on_small_gpus=192,
        lse=True,
    ),
    "triton": Capability(
        (80, 999),
        dtypes=(*_HALF, torch.float32),
        head_dim_multiple=1,
        max_head_dim_in_fp32=128,
        lse=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What a call wants and where: all that the choice depends on, but for what is installed."""

    device_type: str = "cuda"
    architecture: int = 90
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    causal: bool = True
    has_documents: bool = False
    has_window: bool = False
    has_softcap: bool = False
    lengths: str = EQUAL
    is_training: bool = True
    is_deterministic: bool = False
    wants_lse: bool = False
    backend: str = "auto"
    # NANOTRON_FAST_BACKEND, and whether Triton interprets kernels on the CPU.
    environment: str = "auto"
    is_interpreting: bool = False


@dataclass(frozen=True)
class Order(
    Tuned, operation="attention_order", **dict.fromkeys(PREFERENCE, range(len(PREFERENCE) + 1))
):
    """Each implementation's place among those that "auto" tries; the least is the first."""

    flash_attn_3: int
    sdpa_cudnn: int
    flash_attn_2: int
    sdpa_flash: int
    sdpa_varlen: int
    triton: int
    torch: int

    @classmethod
    def rule(cls, head_cols: int, documents: int, options: int, training: int) -> Order:
        return cls(**{name: place for place, name in enumerate(PREFERENCE, 1)})

    def candidates(self) -> list[Order]:
        """Each of them before all others, but the reference, which is the slowest by far."""
        return [replace(self, **{each.name: 0}) for each in fields(self) if each.name != "torch"]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(PREFERENCE, key=lambda name: getattr(self, name)))


def _order(request: Request) -> tuple[tuple[str, ...], str]:
    """What to try in turn, and what this order is."""
    key = {
        "head_cols": next_power_of_2(request.head_dim),
        "documents": int(request.has_documents),
        "options": int(request.has_window or request.has_softcap),
        "training": int(request.is_training),
    }
    rule = Order.rule(**key)
    # Without a GPU nothing was measured.
    is_there = request.architecture > 0
    order = Order.chosen(on=f"sm_{request.architecture}", **key) if is_there else rule
    return order.names, "published" if order == rule else "measured"


def _unfit(name: str, request: Request, on_any_device: bool = False) -> str:
    """Why an implementation cannot serve a request, installed or not; empty where it can."""
    if name == "torch":
        return ""
    able = CAPABILITIES[name]
    if request.device_type == "cuda":
        low, high = able.architectures
        if request.architecture == 0:
            return "needs a GPU, and there is none"
        if not low <= request.architecture <= high:
            return f"is for sm_{low} to sm_{high}, not sm_{request.architecture}"
    elif request.device_type == "meta" or not (
        on_any_device or (name == "triton" and request.is_interpreting)
    ):
        return f"needs a GPU, not tensors on {request.device_type}"
    if request.dtype not in able.dtypes:
        return f"takes no {request.dtype}"
    if name == "triton" and request.is_interpreting and not interprets_products(request.dtype):
        return f"takes no {request.dtype} in Triton's interpreter, which gets its products wrong"
    is_fp32 = request.dtype == torch.float32
    limit = able.max_head_dim_in_fp32 if is_fp32 else able.max_head_dim
    if request.head_dim > limit or request.head_dim % able.head_dim_multiple:
        multiple = f"multiples of {able.head_dim_multiple} " if able.head_dim_multiple > 1 else ""
        return f"takes head_dim {multiple}up to {limit}, not {request.head_dim}"
    limit = able.max_head_dim_to_train_on_small_gpus
    if request.is_training and request.architecture in _SMALL_GPUS and request.head_dim > limit:
        return f"trains head_dim up to {limit} on sm_{request.architecture}"
    for is_wanted, is_able, what in (
        (request.has_documents, able.documents, "documents (cu_seqlens)"),
        (request.has_window, able.window, "a window"),
        (request.has_softcap, able.softcap, "a softcap"),
        (request.is_deterministic, able.deterministic, "deterministic algorithms"),
        (request.wants_lse, able.lse, "attention_forward and attention_backward"),
    ):
        if is_wanted and not is_able:
            return f"cannot do {what}"
    if request.causal and request.lengths not in able.lengths:
        return f"cannot do a causal mask with {request.lengths} than keys"
    return ""


def choose_backend(request: Request, missing: Callable[[str], str]) -> tuple[str, str]:
    """The name of the implementation that serves a request, and the reason, for people.

    Args:
        request: what is wanted.
        missing: name -> why it is not there to be used; empty where it is.

    Raises:
        ValueError: `backend` is unknown, or names what cannot serve the request.
    """
    backend = request.backend
    if backend == "auto" and request.environment == "torch":
        return "torch", "NANOTRON_FAST_BACKEND=torch"
    if backend == "auto" and request.environment == "triton":
        why_not = _unfit("triton", request, on_any_device=True) or missing("triton")
        if why_not:
            return "torch", f"NANOTRON_FAST_BACKEND=triton, but it {why_not}"
        return "triton", "NANOTRON_FAST_BACKEND=triton"
    if backend == "auto" and request.device_type == "cpu" and not request.has_softcap:
        return "sdpa_cpu", "tensors on cpu"
    if backend == "auto" and request.device_type != "cuda":
        what = "with a softcap, which torch's kernels have not, " if request.has_softcap else ""
        return "torch", f"{what}tensors on {request.device_type}"
    if backend == "auto":
        names, order = _order(request)
    elif backend in GROUPS or backend in PREFERENCE:
        names = GROUPS.get(backend, (backend,))
    else:
        known = ", ".join(("auto", *GROUPS, *PREFERENCE))
        raise ValueError(f"attention: backend={backend!r}: choose {known}")
    refusals = []
    for name in names:
        why_not = _unfit(name, request) or missing(name)
        if not why_not:
            passed = f" ({'; '.join(refusals)})" if refusals else ""
            reason = f"backend={backend!r}" if backend != "auto" else f"first of the {order} order"
            return name, reason + passed
        refusals.append(f"{name} {why_not}")
    raise ValueError(f"attention: backend={backend!r} cannot serve this: {'; '.join(refusals)}")
