"""flash_attn.bert_padding of 2.6: tokens without their padding, and back.

unpad_input returns four values; from flash-attn 2.7 on it returns five.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input (n, ...), indices (m,) -> (m, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """values (m, ...), indices (m,), all different -> (first_axis_dim, ...), zeros elsewhere."""
    zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """hidden_states (batch, seq, ...), attention_mask (batch, seq) bool or int, 1 where valid.

    Returns the valid tokens (total, ...), their indices in the flattened batch, cu_seqlens
    (batch + 1,) int32, and the longest sequence.
    """
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """hidden_states (total, ...), indices (total,) -> (batch, seqlen, ...), zeros elsewhere."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))
