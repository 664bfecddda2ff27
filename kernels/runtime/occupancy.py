"""How many programs of a kernel a GPU holds at once, and how much shared memory one may have.

A kernel that walks over rows with a stride of all its programs is launched once per place where a
program fits: with fewer a part of the GPU idles, with more the last ones come alone at the end.
"""

from __future__ import annotations

from typing import Any

import torch

from nanotron_fast.kernels.runtime.launch import compiled

# Registers are handed out to a warp in units of 256, and warps lie on four schedulers.
_REGISTER_UNIT = 256
_SCHEDULERS = 4
_WARP = 32
# Shared memory that the driver keeps for each program.
_RESERVED_BYTES = 1024
# Kilobytes of shared memory that a program may ask for, by capability. Others give 99 at least.
_SHARED_KILOBYTES = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_SHARED_KILOBYTES = 99

# A launch's configuration -> programs that its device holds at once.
_resident: dict[tuple[Any, ...], int] = {}


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number where kernels are interpreted."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 2


def shared_memory_of(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a program may use on a GPU of that compute capability."""
    return _SHARED_KILOBYTES.get(capability, _LEAST_SHARED_KILOBYTES) << 10


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that a program may use; for a CPU, the least that any GPU has."""
    if device.type != "cuda":
        return _LEAST_SHARED_KILOBYTES << 10
    properties = torch.cuda.get_device_properties(device)
    told = getattr(properties, "shared_memory_per_block_optin", None)
    return int(told or shared_memory_of((properties.major, properties.minor)))


def programs_per_multiprocessor(
    registers: int, shared_bytes: int, num_warps: int, properties: Any
) -> int:
    """Programs that a multiprocessor holds at once, at least 1.

    Args:
        registers: of a thread.
        shared_bytes: of a program.
        num_warps: of a program.
        properties: what torch.cuda.get_device_properties gives.
    """
    per_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    warps_by_registers = properties.regs_per_multiprocessor // _SCHEDULERS // per_warp * _SCHEDULERS
    warps = min(warps_by_registers, properties.max_threads_per_multi_processor // _WARP)
    by_shared = properties.shared_memory_per_multiprocessor // (shared_bytes + _RESERVED_BYTES)
    return max(1, min(warps // num_warps, by_shared))


def resident_programs(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], device: torch.device
) -> int:
    """Programs of a launch that the whole device holds at once.

    The kernel is compiled for it, and loaded, where this configuration is new; after that this is
    one look into a table, without a word to the GPU, so that a graph can capture it. The number
    depends on the configuration alone, never on what was launched before.

    Args:
        kernel: a Triton kernel.
        arguments: what the launch passes by position. A dtype stands for a tensor of it, whose
            address is a multiple of 16.
        constants: what it passes by name, its options among them.
        device: the current one.
    """
    if device.type != "cuda":  # interpreted: nothing to fill
        return 2 * num_multiprocessors(device)
    key = (kernel.fn, device, *map(_specialisation, arguments), *constants.items())
    programs = _resident.get(key)
    if programs is None:
        binary = compiled(kernel, *arguments, **constants)
        each = programs_per_multiprocessor(
            binary.n_regs,
            binary.metadata.shared,
            binary.metadata.num_warps,
            torch.cuda.get_device_properties(device),
        )
        programs = _resident[key] = each * num_multiprocessors(device)
    return programs


def _specialisation(value: Any) -> tuple[Any, ...]:
    """What Triton compiles a kernel anew for: dtypes, and what numbers can be divided by."""
    if isinstance(value, tuple):
        return tuple(map(_specialisation, value))
    if isinstance(value, int):
        return int, value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return (value,)
