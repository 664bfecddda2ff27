"""Block sizes of the attention kernels, and which of them a launch tries.

The first call of a kind times the few that its GPU can run, and keeps the fastest, where no sweep
has measured it on such a GPU before. None of them spills registers on sm_80, sm_90 or sm_100, which
tests/kernels/compiling holds them to, with the Triton of constraints.txt; with 3.6 four of dkv's
spill 8 to 136 bytes on sm_90. Those with TMA, the bulk copy engine, need sm_90. On the H100 a block
of 64 x 128 or more keeps its matrix units busy from shared memory; narrower ones are here for what
needs more registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from triton import Config

from nanotron_fast.kernels.runtime import capture
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2


def _tma(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "TMA": True}
    return Config(blocks, num_warps=num_warps, num_stages=num_stages)


def _plain(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "TMA": False}
    return Config(blocks, num_warps=num_warps, num_stages=num_stages)


# Rows of a block that a launch can have.
_SIDES = powers_of_2(16, 256)
Table = dict[int, list[Config]]
# head_dim, padded to a power of two -> configurations.
FORWARD: Table = {
    64: [_tma(128, 64, 4, 3), _tma(128, 128, 8, 3), _plain(128, 64, 8, 3)],
    128: [_tma(128, 128, 8, 2), _tma(128, 64, 8, 3), _plain(128, 64, 8, 2)],
    256: [_tma(128, 64, 8, 2), _tma(128, 32, 8, 3), _plain(64, 32, 8, 2)],
}
DQ: Table = {
    64: [_tma(128, 64, 8, 3), _tma(128, 128, 8, 2), _plain(128, 64, 8, 3)],
    128: [_tma(128, 64, 8, 2), _tma(128, 128, 8, 2), _plain(64, 64, 8, 2), _plain(128, 32, 8, 2)],
    256: [_tma(64, 64, 8, 2), _tma(128, 32, 8, 2), _plain(64, 32, 8, 2)],
}
DKV: Table = {
    64: [_tma(64, 128, 8, 3), _tma(128, 128, 8, 2), _plain(64, 128, 8, 3), _plain(32, 64, 4, 2)],
    128: [_tma(64, 128, 8, 2), _tma(64, 64, 4, 2), _plain(32, 64, 8, 2)],
    256: [_tma(32, 64, 8, 2), _tma(16, 64, 8, 2), _plain(32, 32, 8, 2)],
}
# The same for documents, and with a window or a softcap, which take registers of their own.
FORWARD_DOCUMENTS: Table = FORWARD
FORWARD_OPTIONS: Table = FORWARD | {
    128: [_tma(128, 128, 8, 2), _tma(128, 64, 8, 3), _plain(128, 32, 8, 2)],
}
DQ_DOCUMENTS: Table = DQ | {
    128: [_tma(128, 64, 8, 2), _plain(64, 64, 8, 2), _plain(128, 32, 8, 2)],
}
DQ_OPTIONS: Table = DQ | {
    64: [_tma(128, 64, 8, 3), _plain(64, 32, 4, 3)],
    128: [_tma(128, 64, 8, 2), _plain(128, 32, 8, 2)],
    256: [_tma(64, 32, 8, 2), _plain(64, 32, 8, 2)],
}
DKV_DOCUMENTS: Table = DKV | {
    128: [_tma(64, 128, 8, 2), _tma(32, 128, 8, 2), _plain(32, 64, 8, 2)],
    256: [_tma(16, 64, 8, 2), _tma(32, 32, 8, 2), _plain(32, 32, 8, 2)],
}
DKV_OPTIONS: Table = {
    64: [_tma(64, 128, 8, 3), _plain(32, 64, 4, 2)],
    128: [_tma(32, 128, 8, 2), _plain(32, 64, 8, 2)],
    256: [_tma(32, 32, 8, 2), _plain(32, 32, 8, 2)],
}
# Products of fp32 are exact and run on the ordinary cores. They are slow, and with a head_dim above
# 128 take more registers than there are.
_FP32 = _plain(16, 16, 8, 1)
# For the interpreter: blocks of unequal sides, and short, so that few rows cross many edges.
INTERPRETED = _plain(32, 16, 1, 1)


def tuned(dense: Table, documents: Table, options: Table) -> dict[str, Any]:
    """Arguments of triton.autotune for a kernel with these tables."""

    def prune(configs: list[Config], named_args: dict[str, Any], **kwargs: Any) -> list[Config]:
        arguments = {**named_args, **kwargs}
        q = arguments["q_ptr"]
        # Asked for where this kind of call is new, to be timed.
        capture.refuse_if_capturing(q.device, "attention of a kind whose blocks are not chosen yet")
        if q.dtype == torch.float32:
            return [_FP32]
        has_options = arguments["HAS_WINDOW"] or arguments["HAS_SOFTCAP"]
        table = options if has_options else documents if arguments["VARLEN"] else dense
        choices = table[max(arguments["BLOCK_D"], 64)]
        if not arguments["CAN_TMA"]:
            return [config for config in choices if not config.kwargs["TMA"]]
        # Off the GPU launches are only compiled, and all that could run somewhere are wanted.
        return [config for config in choices if config.kwargs["TMA"] or not q.is_cuda]

    early_prune: Callable[..., list[Config]] = prune
    tables = (dense, documents, options)
    return {
        "configs": [config for table in tables for configs in table.values() for config in configs],
        "key": [
            "HEAD_DIM",
            "CAUSAL",
            "HAS_WINDOW",
            "HAS_SOFTCAP",
            "VARLEN",
            "CAN_TMA",
            "size_class",
        ],
        "prune_configs_by": {"early_config_prune": early_prune},
        # In Triton's cache, where the next process finds it.
        "cache_results": True,
    }


@dataclass(frozen=True)
class ForwardBlocks(
    Tuned, operation="attention_forward", block_m=_SIDES, block_n=_SIDES, tma=range(2)
):
    """What of a Config is tuned."""

    block_m: int
    block_n: int
    tma: int
    num_warps: int
    num_stages: int

    @classmethod
    def rule(
        cls,
        block_d: int,
        causal: int,
        options: int,
        documents: int,
        can_tma: int,
        size_class: int,
        itemsize: int,
    ) -> None:
        """There is none: where nothing was measured, Triton's tuner times the tables above."""

    @classmethod
    def check(cls, where: str, config: dict[str, int], key: dict[str, int]) -> None:
        super().check(where, config, key)
        if config["tma"] > key["can_tma"]:
            raise ValueError(f"{where}: field 'tma' of `config` is 1, and `can_tma` of `key` is 0")

    @classmethod
    def of(cls, config: Config) -> ForwardBlocks:
        blocks = config.kwargs
        sizes = blocks["BLOCK_M"], blocks["BLOCK_N"], int(blocks["TMA"])
        return cls(*sizes, config.num_warps, config.num_stages)

    def config(self) -> Config:
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "TMA": bool(self.tma)}
        return Config(blocks, num_warps=self.num_warps, num_stages=self.num_stages)


class DqBlocks(ForwardBlocks, operation="attention_dq"):
    pass


class DkvBlocks(ForwardBlocks, operation="attention_dkv"):
    pass


_BLOCKS = {"forward_kernel": ForwardBlocks, "dq_kernel": DqBlocks, "dkv_kernel": DkvBlocks}


def measured(kernel: str, constants: dict[str, Any], size_class: int, itemsize: int) -> Any:
    """The Config that was measured for a launch of a kernel; None where none was."""
    blocks = _BLOCKS[kernel].chosen(
        block_d=constants["BLOCK_D"],
        causal=int(constants["CAUSAL"]),
        options=int(constants["HAS_WINDOW"] or constants["HAS_SOFTCAP"]),
        documents=int(constants["VARLEN"]),
        can_tma=int(constants["CAN_TMA"]),
        size_class=size_class,
        itemsize=itemsize,
    )
    return None if blocks is None else blocks.config()
