"""What is to be known of a parameter beside its values, in the one place that knows it.

Initialisation, clipping, saving and ZeRO ask here: how a parameter is cut, whether its gradient has
to be summed over the tensor-parallel group, where its other copy is.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nanotron_fast.errors import TopologyError
from nanotron_fast.families.parts import Param
from nanotron_fast.families.roles import Role, is_hidden_matrix, is_row_bias, role_of
from nanotron_fast.model.spread import has_copies
from nanotron_fast.model.topology import Topology
from nanotron_fast.models.architecture import HEAD, Architecture, Block
from nanotron_fast.models.names import embedding_of


@dataclass(frozen=True, slots=True)
class Facts:
    """One parameter of one rank.

    Args:
        name: as in `named_parameters()`.
        param: of the family's table: its whole shape, how it is cut, its chunks, its block.
        role: what it is for.
        is_sharded: each rank of the tensor-parallel group has a part of it. If not, all have the
            same values, and it counts once in a norm over the group.
        sums_over_tp: its ranks have gradients of their own tokens or heads alone: the gradient is
            the sum over the tensor-parallel group. Never where it is sharded.
        tied_with: the name of its copy on another pipeline stage; None where it has none.
        copies: how many tensor-parallel ranks in a row have the same of a part of it: of
            key-value heads that they outnumber. The gradient of that part is the sum over them.
        copied: that part, as the first element of the flattened shard and the one behind its last.
        is_row_bias: of a matrix whose input features are cut. Nanotron has it on the first rank of
            the tensor-parallel group alone; here every rank has it, and adds it after the sum.
    """

    name: str
    param: Param
    role: Role
    is_sharded: bool
    sums_over_tp: bool
    tied_with: str | None = None
    copies: int = 1
    copied: tuple[int, int] = (0, 0)
    is_row_bias: bool = False

    @property
    def stored_name(self) -> str:
        """By which files know it: both copies of a tied matrix go by the embedding's name."""
        return self.name if self.tied_with is None or self.name != HEAD else self.tied_with

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of the parameter over all ranks."""
        return self.param.shape

    @property
    def is_hidden_matrix(self) -> bool:
        """A matrix of a layer, as Muon takes them: no embedding, head, router, norm or bias."""
        return is_hidden_matrix(self.param)

    def is_decayed(self, excluded: Iterable[str]) -> bool:
        """Whether weight decay applies, where names that match a pattern are excluded.

        As in Nanotron, a pattern has to match from a name's beginning on (`re.match`).
        """
        return not any(re.match(pattern, self.name) for pattern in excluded)

    def is_counted(self, tp_rank: int) -> bool:
        """Whether a norm over all ranks takes this rank's copy: each value counts once."""
        is_second = self.tied_with is not None and self.name == HEAD
        return not is_second and (self.is_sharded or tp_rank == 0)


class OwnsBlocks(Protocol):
    """What is asked of a decoder."""

    architecture: Architecture
    topology: Topology
    blocks: tuple[Block, ...]
    mode: str

    def named_parameters(self) -> Iterable[tuple[str, object]]: ...


def params_of(architecture: Architecture, blocks: Iterable[Block]) -> dict[str, Param]:
    """The parameters of some blocks, in the order of the table.

    A tied head is one of its own where the embedding is not among the blocks.
    """
    owned = set(blocks)
    params = architecture.params()
    mine = {param.name: param for param in params if param.block in owned}
    is_apart = "head" in owned and "embedding" not in owned
    if architecture.spec.tie_word_embeddings and is_apart:
        embedding = next(param for param in params if param.block == "embedding")
        mine[HEAD] = replace(embedding, name=HEAD, block="head")
    return mine


def facts_of(decoder: OwnsBlocks) -> dict[str, Facts]:
    """The facts of every parameter of a decoder, in the order of `named_parameters()`.

    Raises TopologyError where the decoder has other parameters than its family's table.
    """
    params = params_of(decoder.architecture, decoder.blocks)
    names = [name for name, _ in decoder.named_parameters()]
    if set(names) != set(params):
        raise TopologyError(
            "the decoder's parameters and its family's table differ in "
            f"{', '.join(sorted(set(names) ^ set(params)))}"
        )
    return {
        name: replace(
            _facts(params[name], decoder.architecture, decoder.blocks, decoder.mode),
            **_copies(params[name], decoder.topology.tp),
            is_row_bias=is_row_bias(name, params),
        )
        for name in names
    }


def _facts(param: Param, architecture: Architecture, blocks: Iterable[Block], mode: str) -> Facts:
    is_sharded = "tp" in param.cuts
    role = role_of(param)
    # In all-reduce mode every rank sees all tokens, but its own heads and rows of the MLP alone.
    is_of_shards = param.name.endswith(_OF_SHARDS)
    return Facts(
        param.name,
        param,
        role,
        is_sharded,
        sums_over_tp=not is_sharded and (mode == "reduce_scatter" or is_of_shards),
        tied_with=_tied_with(param, architecture, blocks),
    )


def _copies(param: Param, tp: int) -> dict[str, Any]:
    """What ranks have copies of: it lies in one piece."""
    if not has_copies(param.heads, tp):
        return {}
    spans = [span for span in param.spans(tp, 0) if span.copies > 1]
    assert param.cuts["tp"] == 0
    assert all(one.local + one.length == other.local for one, other in itertools.pairwise(spans))
    width = math.prod(param.shape[1:])
    end = spans[-1].local + spans[-1].length
    return {"copies": spans[0].copies, "copied": (spans[0].local * width, end * width)}


# Of norms of queries and keys, and of an activation with parameters.
_OF_SHARDS = (".q_norm.weight", ".k_norm.weight", ".act_fn.alpha_p", ".act_fn.alpha_n")


def _tied_with(param: Param, architecture: Architecture, blocks: Iterable[Block]) -> str | None:
    if not architecture.spec.tie_word_embeddings:
        return None
    owned = set(blocks)
    if param.name == HEAD:
        return embedding_of(architecture.family)
    return HEAD if param.block == "embedding" and "head" not in owned else None
