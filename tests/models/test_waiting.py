"""No layer of a decoder asks torch for what waits for the device, or cannot be captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanotron_fast.models import build
from nanotron_fast.models.batch import document_edges
from nanotron_fast.models.experts import _counts
from tests.families import zoo
from tests.models.tiny import save, tokens

# Of those that torch carries out on a GPU with a look at values. Reading single values is not among
# them: CPU tensors are checked with such, where tensors on a GPU are not.
_WAITING = ("aten::nonzero", "aten::bincount", "aten::_unique2", "aten::masked_select")


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        indices = args[1] if function._schema.name.startswith("aten::index") else ()
        if function._schema.name in _WAITING or any(
            isinstance(each, Tensor) and each.dtype == torch.bool
            for each in (indices if isinstance(indices, (list, tuple)) else ())
        ):
            self.found.add(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_what_waits() -> None:
    with _Watch() as watch:
        mask = torch.arange(4) > 1
        assert mask.nonzero().numel() == torch.arange(4)[mask].numel() == 2
    assert watch.found == {"aten::nonzero", "aten::index"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_step_waits_for_nothing(family: str, tmp_path: Path) -> None:
    is_nanotrons = family in ("llama", "qwen2", "qwen2_moe")
    root = save(tmp_path, family) if is_nanotrons else zoo.save(family, tmp_path)
    decoder = build(root)
    ids, _ = tokens(2, 16)
    with _Watch() as watch:
        decoder(ids, labels=ids).backward()
    assert not watch.found


def test_documents_are_counted_where_their_positions_are() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 0, 1]])
    edges = document_edges(positions, positions.device)
    assert edges.dtype == torch.int32
    assert edges.tolist() == [0, 3, 5, 7, 8, 10]
    # This device has no values to count.
    elsewhere = document_edges(positions, torch.device("meta"))
    assert elsewhere.is_meta
    assert (elsewhere.shape, elsewhere.dtype) == (edges.shape, edges.dtype)


@pytest.mark.parametrize("choices", [[], [0], [3, 1, 1, 2, 0, 3, 3], [5, 5]])
def test_counts_of_experts(choices: list[int]) -> None:
    chosen = torch.tensor(choices, dtype=torch.int64)
    assert torch.equal(_counts(chosen.sort().values, 6), torch.bincount(chosen, minlength=6))
