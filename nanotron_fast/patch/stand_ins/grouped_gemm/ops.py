"""grouped_gemm.ops: one matrix product per expert, and tokens sorted by expert and back."""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.patch.stand_ins.arguments import refuse


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """a (tokens, k) sorted by expert, b (experts, k, n), or (experts, n, k) with trans_b.

    batch_sizes (experts,) integers: how many rows of a belong to each. Returns (tokens, n).
    """
    weights = b.transpose(1, 2) if trans_b else b
    sizes = batch_sizes.tolist()
    if len(sizes) != len(b) or sum(sizes) != len(a):
        raise ValueError(f"gmm: batch_sizes {sizes} for a {tuple(a.shape)} and b {tuple(b.shape)}")
    rows = a.split(sizes)
    return torch.cat([part @ weight for part, weight in zip(rows, weights, strict=True)])


def permute(
    input_act: Tensor,
    indices: Tensor,
    num_out_tokens: int | None = None,
    max_token_num: int = 0,
) -> tuple[Tensor, Tensor]:
    """Rows of input_act (tokens, hidden), one copy for each of its experts, sorted by expert.

    indices (tokens,) or (tokens, top_k) integers. Returns (tokens * top_k, hidden), and the map
    that `unpermute` takes: for each copy in the order of indices, its row in the result.
    max_token_num sizes the real one's workspace; here it is of no use.
    """
    refuse("permute", num_out_tokens=bool(num_out_tokens))
    experts = indices.reshape(len(indices), -1)
    order = experts.flatten().argsort(stable=True)
    row_id_map = torch.empty_like(order)
    row_id_map[order] = torch.arange(len(order), device=order.device)
    return input_act.index_select(0, order // experts.shape[1]), row_id_map


def unpermute(input_act: Tensor, row_id_map: Tensor, probs: Tensor | None = None) -> Tensor:
    """Back to the tokens: the sum of a token's copies, weighted by probs (tokens, top_k).

    input_act (tokens * top_k, hidden) and the result are of one dtype; the sum is in fp32.
    """
    copies = input_act.index_select(0, row_id_map)
    if probs is None:
        return copies
    wide = torch.promote_types(input_act.dtype, torch.float32)
    weighted = copies.unflatten(0, probs.shape).to(wide) * probs.to(wide)[..., None]
    return weighted.sum(1).to(input_act.dtype)
