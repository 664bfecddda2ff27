"""The tables of a model's rotary embeddings, made when they are first needed.

They are no buffers of the module: nothing is saved of them, and a model on the meta device has
none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.rope import rope_tables
from nanotron_fast.kernels.runtime import capture
from nanotron_fast.model.spec import Attention, ModelSpec

Tables = tuple[Tensor, Tensor]
# Rows that turn, the base where it is the layer's own, what the frequencies depend on, the device.
_Key = tuple[int, float | None, int, torch.device]
# Rows of a table at least, so that sequences of nearly one length share it.
_MIN_POSITIONS = 512


class Rotary:
    """Cosines and sines for every layer of a model.

    With "dynamic" and "longrope" scaling the frequencies depend on the length of the sequence, as
    transformers decides anew for each batch.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._tables: dict[_Key, Tables] = {}

    def tables(self, attention: Attention, length: int, device: torch.device) -> Tables:
        """cos and sin (positions, rotary rows / 2) fp32, for positions below `length` at least.

        A layer without rotary embedding gets tables that turn nothing. Raises RuntimeError where
        a CUDA graph is captured and they are new: see `capture`.
        """
        rotary_dim = 0 if attention.rotary is None else attention.rotary[1] - attention.rotary[0]
        regime = 0 if attention.rope_theta is not None else self._regime(length)
        key = (rotary_dim, attention.rope_theta, regime, device)
        found = self._tables.get(key)
        if found is None or len(found[0]) < length:
            # Twice as long as the one before, so that generation makes few of them.
            positions = max(length, _MIN_POSITIONS, 2 * len(found[0]) if found else 0)
            what = f"a model whose tables of {length} positions are new"
            capture.refuse_if_capturing(device, what)
            found = self._make(key, positions)
            self._keep(key, found)
        return capture.keep(found, device)

    def _regime(self, length: int) -> int:
        """What the frequencies depend on: a sequence length, or 0 for every short one."""
        limit = self.spec.max_position_embeddings
        if self.spec.rope_kind == "dynamic":
            return length if length > limit else 0
        if self.spec.rope_kind in ("longrope", "su"):
            stated = (self.spec.rope_scaling or {}).get("original_max_position_embeddings")
            return length if length > (stated or limit) else 0
        return 0

    def _keep(self, key: _Key, tables: Tables) -> None:
        # Generation past a limit has a regime for each length: the last is enough.
        for other in [each for each in self._tables if each[:2] == key[:2] and each[2] != 0]:
            del self._tables[other]
        self._tables[key] = tables

    def _make(self, key: _Key, positions: int) -> Tables:
        rotary_dim, own_theta, regime, device = key
        if rotary_dim == 0:
            shape = (positions, 1)
            return torch.ones(shape, device=device), torch.zeros(shape, device=device)
        return rope_tables(
            rotary_dim,
            positions,
            self.spec.rope_theta if own_theta is None else own_theta,
            self.spec.rope_scaling if own_theta is None else None,
            max_position_embeddings=self.spec.max_position_embeddings,
            seq_len=regime,
            device=device,
        )
