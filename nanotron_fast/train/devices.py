"""What a device can do at most, for the share of it that a run uses (MFU)."""

from __future__ import annotations

import re
from collections.abc import Mapping

# FLOPs a second of dense products in bf16, by the vendors' data sheets. Of two that a device's name
# contains, the more special one comes first.
_PEAK_BF16: Mapping[str, float] = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "MI300X": 1307.4e12,
    "MI250X": 383e12,
}
# As TF32, in which torch multiplies fp32 where it is allowed to.
_SHARE_OF_FP32 = 0.5


def peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOPs a second of one device, as `torch.cuda.get_device_name` calls it.

    `dtype` is bfloat16 or float32 (as TF32). None for a device that is not in the table, as CPUs.
    """
    for name, flops in _PEAK_BF16.items():
        if re.search(rf"\b{name}\b", device_name):
            return flops if dtype == "bfloat16" else flops * _SHARE_OF_FP32
    return None
