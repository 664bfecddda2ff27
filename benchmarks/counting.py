"""Counts what a GPU would launch of products, and what is copied beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Which argument has the rows of a product.
_PRODUCTS = {
    **dict.fromkeys((_aten.mm.default, _aten.mm.out, _aten.bmm.default, _aten.bmm.out), 0),
    **dict.fromkeys((_aten.addmm.default, _aten.addmm.out, _aten.addmm_.default), 1),
    **dict.fromkeys((_aten.baddbmm.default, _aten.baddbmm.out), 1),
}
_COPIES = (_aten.copy_.default, _aten.clone.default, _aten.cat.default)


class Counts(TorchDispatchMode):
    """The rows of each product, and the bytes that each copy writes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.copied: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        if function in _PRODUCTS:
            self.rows.append(args[_PRODUCTS[function]].shape[:-1].numel())
        elif function in _COPIES:
            self.copied.append(result.nbytes)
        return result
