"""What all layers are told of the tokens that pass through them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanotron_fast.models.cache import Cache


@dataclass
class Batch:
    """A micro-batch: rows of equal length, each of which may hold several documents.

    Args:
        size, length: rows, and tokens of each.
        device: of the tokens.
        cu_seqlens: (documents + 1,) int32 where documents lie in the rows, else None.
        max_positions: positions are below this.
        cache: of a generation: keys and values of the tokens before these.
        auxiliary_loss: the experts' balance is learned with this weight.
        counts_load: routers count the tokens of their experts.
    """

    size: int
    length: int
    device: torch.device
    cu_seqlens: Tensor | None = None
    max_positions: int = 0
    cache: Cache | None = None
    auxiliary_loss: float = 0.0
    counts_load: bool = False
    _counted: set[int] = field(default_factory=set, repr=False)
    _position_ids: Tensor | None = field(default=None, repr=False)

    def counts(self, router: object) -> bool:
        """Whether a router counts now: once, though a layer may be computed again in backward."""
        is_first = id(router) not in self._counted
        self._counted.add(id(router))
        return self.counts_load and is_first

    @property
    def position_ids(self) -> Tensor:
        """(tokens,) int64: counted from a document's start, and on from what the cache holds."""
        if self._position_ids is None:
            if self.cu_seqlens is None:
                first = 0 if self.cache is None else self.cache.length
                row = torch.arange(first, first + self.length, device=self.device)
                self._position_ids = row.repeat(self.size)
            else:
                tokens = torch.arange(self.size * self.length, device=self.device)
                documents = torch.searchsorted(self.cu_seqlens, tokens, right=True) - 1
                self._position_ids = tokens - self.cu_seqlens[documents]
        return self._position_ids


def document_edges(position_ids: Tensor, device: torch.device) -> Tensor:
    """Where documents start in rows of positions (rows, length): cu_seqlens of all tokens.

    A position of 0 starts a document, and so does every row. Their number is counted where the
    positions are: in the memory of the CPU, nothing waits for the device.
    """
    starts = position_ids == 0
    starts[:, 0] = True
    edges = starts.flatten().nonzero().flatten()
    total = edges.new_tensor([position_ids.numel()])
    found = torch.cat((edges, total)).to(torch.int32)
    if found.device.type == "cpu" and device.type == "cuda":
        found = found.pin_memory()
    return found.to(device, non_blocking=True)
