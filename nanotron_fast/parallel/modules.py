"""The tensor-parallel layers as modules that own this rank's shards, under Nanotron's names."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from nanotron_fast.errors import TopologyError
from nanotron_fast.kernels.embedding import vocab_parallel_embedding
from nanotron_fast.kernels.runtime.collectives import Group, resolve
from nanotron_fast.parallel.communication import check_mode
from nanotron_fast.parallel.linear import column_linear, row_linear


def _share(what: str, features: int, size: int) -> int:
    if features % size:
        raise TopologyError(f"{what}: {features} features do not split over tp={size}")
    return features // size


def _shard(
    what: str,
    whole: Tensor,
    *,
    dim: int,
    rank: int,
    size: int,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """A rank's part of a whole tensor, or of each of its sections of these lengths along `dim`."""
    sections = whole.split(list(lengths), dim) if lengths else (whole,)
    for section in sections:
        _share(what, section.shape[dim], size)
    return torch.cat([section.chunk(size, dim)[rank] for section in sections], dim)


class _OfRanks(nn.Module):
    """A module of a group, which its deep copies share: a ProcessGroup cannot be copied."""

    group: Group

    def __deepcopy__(self, memo: dict[int, Any]) -> _OfRanks:
        copied = type(self).__new__(type(self))
        memo |= {id(self): copied, id(self.group): self.group}
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied


class _ParallelLinear(_OfRanks):
    """What column and row linears share: a weight, perhaps a bias, a group and a mode."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def _make(self, rows: int, cols: int, *, bias: bool, factory: dict[str, Any]) -> None:
        self.weight = nn.Parameter(torch.empty(rows, cols, **factory))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(rows, **factory)) if bias else None
        )
        # torch.nn.Linear's initialisation, for the fan-in of the whole layer.
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, tp={self.tp_size}, mode={self.mode}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """`column_linear` with this rank's rows of the weight.

    Args:
        in_features, out_features: of the whole layer.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for a rank alone.
        mode: "all_reduce" or "reduce_scatter".
        bias: every rank has its rows' share.
        recompute_allgather: with "reduce_scatter", gather the input again in backward.
        contiguous_chunks: sizes of packed sections of the output features, such as (q, k, v): each
            is split over the ranks by itself.

    Raises:
        TopologyError: the features, or those of a chunk, do not divide by the group's size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: Group = None,
        mode: str = "all_reduce",
        bias: bool = False,
        recompute_allgather: bool = True,
        contiguous_chunks: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_mode(mode)
        self.group = group
        _, self.tp_rank, self.tp_size = resolve(group)
        self.in_features, self.out_features, self.mode = in_features, out_features, mode
        self.recompute_allgather = recompute_allgather
        self.contiguous_chunks = None if contiguous_chunks is None else tuple(contiguous_chunks)
        if self.contiguous_chunks is not None:
            if sum(self.contiguous_chunks) != out_features:
                raise ValueError(
                    f"contiguous_chunks {self.contiguous_chunks} sum to "
                    f"{sum(self.contiguous_chunks)}, not to out_features {out_features}"
                )
            for chunk in self.contiguous_chunks:
                _share("a chunk of ColumnParallelLinear", chunk, self.tp_size)
        rows = _share("ColumnParallelLinear", out_features, self.tp_size)
        self._make(rows, in_features, bias=bias, factory={"device": device, "dtype": dtype})

    @torch.no_grad()
    def load_whole(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Fills this rank's shards from (out_features, in_features) and (out_features,)."""
        where: dict[str, Any] = {
            "dim": 0,
            "rank": self.tp_rank,
            "size": self.tp_size,
            "lengths": self.contiguous_chunks,
        }
        self.weight.copy_(_shard("weight", weight, **where))
        if self.bias is not None and bias is not None:
            self.bias.copy_(_shard("bias", bias, **where))

    def forward(self, x: Tensor) -> Tensor:
        return column_linear(
            x,
            self.weight,
            self.bias,
            group=self.group,
            mode=self.mode,
            recompute_allgather=self.recompute_allgather,
        )


class RowParallelLinear(_ParallelLinear):
    """`row_linear` with this rank's columns of the weight; the bias lives on rank 0 alone.

    Args: as of ColumnParallelLinear. `contiguous_chunks` are of the input features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: Group = None,
        mode: str = "all_reduce",
        bias: bool = False,
        contiguous_chunks: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_mode(mode)
        self.group = group
        _, self.tp_rank, self.tp_size = resolve(group)
        self.in_features, self.out_features, self.mode = in_features, out_features, mode
        self.contiguous_chunks = None if contiguous_chunks is None else tuple(contiguous_chunks)
        if self.contiguous_chunks is not None and sum(self.contiguous_chunks) != in_features:
            raise ValueError(
                f"contiguous_chunks {self.contiguous_chunks} sum to "
                f"{sum(self.contiguous_chunks)}, not to in_features {in_features}"
            )
        cols = _share("RowParallelLinear", in_features, self.tp_size)
        has_bias = bias and self.tp_rank == 0
        factory = {"device": device, "dtype": dtype}
        self._make(out_features, cols, bias=has_bias, factory=factory)

    @torch.no_grad()
    def load_whole(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Fills this rank's shard from (out_features, in_features); the bias on rank 0."""
        shard = _shard(
            "weight",
            weight,
            dim=1,
            rank=self.tp_rank,
            size=self.tp_size,
            lengths=self.contiguous_chunks,
        )
        self.weight.copy_(shard)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return row_linear(x, self.weight, self.bias, group=self.group, mode=self.mode)


class VocabParallelEmbedding(_OfRanks):
    """`vocab_parallel_embedding` with this rank's rows of the table.

    Takes ids (...) and gives (..., embedding_dim): summed over the ranks, or in mode
    "reduce_scatter" this rank's share of dimension 0. `padding_idx` is an id of the whole table
    whose row has no gradient.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        group: Group = None,
        mode: str = "all_reduce",
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_mode(mode)
        self.group = group
        _, self.tp_rank, self.tp_size = resolve(group)
        self.padding_idx = padding_idx
        self.num_embeddings, self.embedding_dim, self.mode = num_embeddings, embedding_dim, mode
        rows = _share("VocabParallelEmbedding", num_embeddings, self.tp_size)
        self.weight = nn.Parameter(torch.empty(rows, embedding_dim, device=device, dtype=dtype))
        nn.init.normal_(self.weight)

    @torch.no_grad()
    def load_whole(self, weight: Tensor) -> None:
        """Fills this rank's rows from (num_embeddings, embedding_dim)."""
        shard = _shard("weight", weight, dim=0, rank=self.tp_rank, size=self.tp_size)
        self.weight.copy_(shard)

    def forward(self, ids: Tensor) -> Tensor:
        return vocab_parallel_embedding(
            ids, self.weight, self.group, mode=self.mode, padding_idx=self.padding_idx
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, tp={self.tp_size}, mode={self.mode}"
