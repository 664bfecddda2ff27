"""The embedding whose rows are split over a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nanotron_fast.kernels.embedding import vocab_parallel_embedding
from nanotron_fast.patch.nanotron.targets import DropInOptions


def embedding(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`TensorParallelEmbedding.forward`; what torch.nn.Embedding alone can do is left to it."""

    def forward(self: Any, input_ids: Tensor) -> Tensor:
        if self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            return original(self, input_ids)
        padding_idx = self.padding_idx
        if padding_idx is not None and options.padding_idx == "nanotron":
            padding_idx += self.min_id  # a row of this rank's shard, whichever token that is
        return vocab_parallel_embedding(
            input_ids,
            self.weight,
            self.pg,
            mode=self.mode.name.lower(),
            padding_idx=padding_idx,
        )

    return forward
