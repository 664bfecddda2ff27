"""Keys and values of the tokens that a generation has passed."""

from __future__ import annotations

from torch import Tensor


class Cache:
    """For each layer, keys and values (batch, capacity, kv heads of this rank, head_dim)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        # Tokens that all layers have seen.
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (batch, tokens, heads, d), and returns all of the layer's so far."""
        batch, tokens, heads, head_dim = k.shape
        end = self.length + tokens
        if layer not in self._layers:
            shape = (batch, self.capacity, heads, head_dim)
            self._layers[layer] = k.new_empty(shape), v.new_empty(shape)
        keys, values = self._layers[layer]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]

    def advance(self, tokens: int) -> None:
        """After all layers have seen so many more."""
        self.length += tokens
