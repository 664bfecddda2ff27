"""Whether a group's large products run over torch's symmetric memory: decided once, by all alike.

There, torch's fused products read the other devices' rows out of their memory, and write sums to
it, without collectives. The environment variable NANOTRON_FAST_SYMMETRIC_MEMORY decides:

- ``auto`` (the default): where all ranks are on one host, each on a device of its own that reaches
  all others' memory, and exchange CUDA tensors over NCCL. Also where
  `torch.distributed._symmetric_memory.enable_symm_mem_for_group` was called on every rank. If it
  then fails, a warning says why, and collectives serve;
- ``0``: never;
- ``1``: always, and an error where that cannot be.

The first large product of a group is where every rank comes by. There the ranks tell each other
what they are, what they ask for, and after each step whether it has failed: all go on alike, and
none waits for one that has turned away.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from nanotron_fast.kernels.runtime.capture import is_capturing
from nanotron_fast.kernels.runtime.collectives import Ranks

ENVIRONMENT_VARIABLE = "NANOTRON_FAST_SYMMETRIC_MEMORY"
MODES = ("auto", "0", "1")
_OPERATORS = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")
_T = TypeVar("_T")


class Facts(NamedTuple):
    """One rank, as the others have to know it."""

    mode: str  # what the environment variable asks for
    obstacle: str | None  # what stands against it on this rank alone
    was_enabled: bool  # by whoever made the group
    host: str
    device: str
    number: int  # of the device, among those that this process sees
    reached: frozenset[str]  # devices whose memory this rank's reads and writes


# What was agreed on for a group, and tensors of a kind of device.
_agreed: WeakKeyDictionary[dist.ProcessGroup, dict[str, bool]] = WeakKeyDictionary()


def is_used(device: torch.device, ranks: Ranks) -> bool:
    """Whether products of tensors on a device run over symmetric memory.

    Communicates at the first call for a group. Never while torch.compile traces or a CUDA graph is
    captured, which all ranks do alike.

    Raises:
        ValueError: a rank's environment variable has no value of those above, or ranks disagree.
        RuntimeError: it is asked for and cannot be. Either is raised on all ranks.
    """
    if torch.compiler.is_compiling() or is_capturing(device):
        return False
    group = dist.distributed_c10d._resolve_process_group(ranks.name)
    agreed = _agreed.setdefault(group, {})
    if device.type not in agreed:
        # What NCCL exchanges lies on the current device.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            agreed[device.type] = _agree(device, group)
    return agreed[device.type]


def _agree(device: torch.device, group: dist.ProcessGroup) -> bool:
    facts = _from_all(_facts(device, group), group)
    modes = {each.mode for each in facts}
    unknown = sorted(modes.difference(MODES))
    if unknown:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={unknown[0]}: choose {', '.join(MODES)}")
    if modes >= {"0", "1"}:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is 0 on some ranks of a group and 1 on others")
    if "0" in modes:
        return False
    why = obstacle(facts)
    has_failed = False
    for step in (_allocate, _meet) if why is None else ():
        errors = _from_all(_error_of(step, device, group), group)
        why = next((f"rank {i}: {error}" for i, error in enumerate(errors) if error), None)
        has_failed = why is not None
        if has_failed:
            break
    if why is not None and "1" in modes:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}=1, but {why}")
    if has_failed:
        warnings.warn(f"collectives in place of symmetric memory: {why}", stacklevel=2)
    return why is None


def obstacle(facts: Sequence[Facts]) -> str | None:
    """Why the ranks that these are of cannot share memory; None where nothing stands against it."""
    for rank, each in enumerate(facts):
        if each.obstacle is not None:
            return f"rank {rank}: {each.obstacle}"
    if all(each.was_enabled for each in facts):
        return None
    if len({each.host for each in facts}) > 1:
        return "the ranks are on several hosts"
    # torch takes devices of one number for the same, whoever sees them under it.
    if len({each.number for each in facts}) < len(facts):
        return "several ranks' devices have the same number (CUDA_VISIBLE_DEVICES should name all)"
    for rank, each in enumerate(facts):
        for other, peer in enumerate(facts):
            if peer.device not in each.reached:
                return f"the device of rank {rank} does not reach that of rank {other}"
    return None


def _facts(device: torch.device, group: dist.ProcessGroup) -> Facts:
    """This rank's. Raises nothing: the others wait for it."""
    mode = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    why, was_enabled = None, False
    name, number, reached = "", 0, frozenset[str]()
    try:
        from torch.distributed import _symmetric_memory

        missing = [each for each in _OPERATORS if not hasattr(torch.ops.symm_mem, each)]
        was_enabled = bool(_symmetric_memory.is_symm_mem_enabled_for_group(group.group_name))
        if missing:
            why = f"torch {torch.__version__} has no symm_mem.{missing[0]}"
        elif device.type != "cuda":
            why = f"tensors are on {device.type}"
        elif "cuda:nccl" not in dist.get_backend_config(group).split(","):
            why = f"the group's backend is {dist.get_backend_config(group)}"
        else:
            number = torch.cuda.current_device() if device.index is None else device.index
            name = _name(number)
            reached = frozenset(
                _name(other)
                for other in range(torch.cuda.device_count())
                if other == number or torch.cuda.can_device_access_peer(number, other)
            )
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    return Facts(mode, why, was_enabled, _host(), name, number, reached)


def _name(number: int) -> str:
    return str(torch.cuda.get_device_properties(number).uuid)


def _host() -> str:
    """The same for processes that can hand each other files: of one name, on one running kernel."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (boot.read_text() if boot.exists() else "")


def _allocate(device: torch.device, group: dist.ProcessGroup) -> None:
    """Fails where the driver or the container has no memory to share, while nobody waits for it."""
    from torch._C._distributed_c10d import _SymmetricMemory

    _SymmetricMemory.empty_strided_p2p((1,), (1,), torch.uint8, device, group.group_name)


def _meet(device: torch.device, group: dist.ProcessGroup) -> None:
    """Opens the memory that torch's fused products share, and grow as they need it."""
    from torch.distributed import _symmetric_memory

    with warnings.catch_warnings():
        # Later versions of torch no longer need this, and say so.
        warnings.simplefilter("ignore", FutureWarning)
        _symmetric_memory.enable_symm_mem_for_group(group.group_name)
    _symmetric_memory.get_symm_mem_workspace(group.group_name, min_size=1)


def _error_of(step: Callable[..., None], *arguments: Any) -> str | None:
    try:
        step(*arguments)
    except Exception as error:  # told to all ranks, who then do without
        return f"{type(error).__name__}: {error}"
    return None


def _from_all(mine: _T, group: dist.ProcessGroup) -> list[_T]:
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, mine, group=group)
    return gathered
