"""What pytest-benchmark writes down about the machine."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Its name is nobody's business."""
    machine_info.pop("node", None)
