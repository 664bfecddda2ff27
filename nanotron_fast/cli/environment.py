"""What this installation has, and which path each operation takes here, and why."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from nanotron_fast import _C
from nanotron_fast.errors import ConfigError
from nanotron_fast.version import __version__

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "numpy",
    "huggingface_hub",
    "nanotron",
    "flash_attn",
    "liger_kernel",
)
_PREFIX = "NANOTRON_FAST_"


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: the path it takes or the state it is in, and why."""

    name: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Environment:
    """What `nanotron-fast env` prints."""

    versions: dict[str, str]
    devices: list[str]
    built: dict[str, str]
    variables: dict[str, str]
    operations: list[Operation] = field(default_factory=list)
    drop_in: list[Operation] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The contract of `env --json`."""
        return {
            "versions": self.versions,
            "devices": self.devices,
            "built": self.built,
            "variables": self.variables,
            "operations": {
                each.name: {"path": each.path, "reason": each.reason} for each in self.operations
            },
            "drop_in": {
                each.name: {"state": each.path, "reason": each.reason} for each in self.drop_in
            },
        }


def environment() -> Environment:
    """Looks around. Raises ConfigError for a NANOTRON_FAST_ variable whose value is none."""
    versions = {"nanotron_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    variables = {name: value for name, value in os.environ.items() if name.startswith(_PREFIX)}
    try:
        import torch
    except ImportError:
        return Environment(versions, [], _built(), variables)
    devices = [_describe(torch, index) for index in range(torch.cuda.device_count())]
    try:
        operations = list(_operations("cuda" if devices else "cpu"))
    except ValueError as error:  # kernels know no errors of ours
        raise ConfigError(str(error)) from None
    return Environment(versions, devices, _built(), variables, operations, _drop_in())


def _describe(torch: Any, index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    memory = f"{found.total_memory / 1e9:.0f} GB"
    return f"cuda:{index} {found.name}, sm_{found.major}{found.minor}, {memory}"


def _built() -> dict[str, str]:
    levels = _C.simd_levels()
    wanted = os.environ.get("NANOTRON_FAST_SIMD", "")
    if wanted and wanted not in levels:
        raise ConfigError(f"NANOTRON_FAST_SIMD={wanted}: choose {', '.join(levels)}")
    built = {"engine": f"native, casts with {wanted or levels[-1]}"}
    try:
        from nanotron_fast import _cuda
    except ImportError as error:
        why = "not built" if "_cuda" in str(error) else str(error)
        built["packer"] = f"without CUDA ({why})"
    else:
        architectures = ", ".join(f"sm_{each}" for each in _cuda.ARCHITECTURES)
        built["packer"] = f"CUDA for {architectures}"
    return built


def _operations(device_type: str) -> Iterator[Operation]:
    from nanotron_fast.kernels import attention
    from nanotron_fast.kernels.matmul import choice as matmul_choice
    from nanotron_fast.kernels.pack import choice as pack_choice
    from nanotron_fast.kernels.runtime import backend

    for name in (
        "rms_norm",
        "rope_qkv",
        "rope_normed",
        "glu",
        "vocab_parallel_cross_entropy",
        "linear_cross_entropy",
        "vocab_parallel_embedding",
        "accumulate_",
        "clip_grad_norm_",
        "adamw_step_",
    ):
        yield Operation(name, *backend.explain(device_type))
    yield Operation("attention", *attention.explain(device_type))
    mode = matmul_choice.requested_mode()
    reason = f"{matmul_choice.ENVIRONMENT_VARIABLE}={mode}"
    if mode == "auto":
        reason = "timed at the first use of a shape" if device_type == "cuda" else "on the CPU"
    path = {"always": "fused", "never": "vendor's"}.get(mode, "")
    path = path or ("the faster" if device_type == "cuda" else "vendor's")
    yield Operation("matmul_glu, matmul_rope", path, reason)
    yield Operation("pack", *pack_choice.explain(device_type))


def _drop_in() -> list[Operation]:
    """What is replaced in Nanotron, or what would be if this process turned the drop-in on."""
    from nanotron_fast.patch.lock import LOCK
    from nanotron_fast.patch.nanotron import registry

    with LOCK:
        return _statuses(registry)


def _statuses(registry: Any) -> list[Operation]:
    was_on = registry.is_enabled()
    try:
        statuses = registry.status() or registry.enable(registry.requested_ops())
    except ImportError as error:
        return [Operation("nanotron", "off", str(error))]
    finally:
        if not was_on:
            registry.disable()
    words = {} if was_on else {"on": "would be on"}
    return [
        Operation(each.target.name, words.get(each.state, each.state), each.reason)
        for each in statuses
    ]


def lines(found: Environment) -> Iterator[str]:
    """For people."""
    yield "versions"
    for name, version in found.versions.items():
        yield f"  {name:16}{version}"
    yield "devices"
    for device in found.devices or ["no CUDA device: operations take the CPU's paths"]:
        yield f"  {device}"
    yield "built"
    for name, what in found.built.items():
        yield f"  {name:16}{what}"
    yield "variables"
    for name, value in sorted(found.variables.items()):
        yield f"  {name}={value}"
    if not found.variables:
        yield "  none that begins with NANOTRON_FAST_"
    yield "operations"
    for each in found.operations:
        yield f"  {each.name:30}{each.path:14}{each.reason}"
    if not found.operations:
        yield "  none: torch is not installed"
    yield "drop-in"
    for each in found.drop_in:
        name = each.name.removeprefix("nanotron.")
        yield f"  {each.path:12}{name}" + (f": {each.reason}" if each.reason else "")
    if not found.drop_in:
        yield "  nothing: torch is not installed"
