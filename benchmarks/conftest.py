"""What pytest-benchmark writes down."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Its name is nobody's business."""
    machine_info.pop("node", None)
    for key in ("flags", "cpuinfo_version", "cpuinfo_version_string"):
        machine_info["cpu"].pop(key, None)


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """The statistics say what the samples say."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
