"""Tensor parallelism with Nanotron's semantics: layers, and whole fused blocks.

Groups are torch.distributed's: a ProcessGroup, or a DeviceMesh of one dimension. Activations are
(tokens, hidden); weights are this rank's shards, as Nanotron stores them.
"""

# ruff: noqa: E402
from __future__ import annotations

from nanotron_fast.extras import require

# Before torch is imported.
require("kernels", "nanotron_fast.parallel")

from nanotron_fast.parallel.attention import tensor_parallel_attention
from nanotron_fast.parallel.linear import column_linear, row_linear
from nanotron_fast.parallel.mlp import tensor_parallel_mlp
from nanotron_fast.parallel.modules import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from nanotron_fast.parallel.norm import rms_norm_over_ranks
from nanotron_fast.parallel.whole import for_all_ranks

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "column_linear",
    "for_all_ranks",
    "rms_norm_over_ranks",
    "row_linear",
    "tensor_parallel_attention",
    "tensor_parallel_mlp",
]
