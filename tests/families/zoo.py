"""Tiny random models of the families that transformers has, made with its own classes.

A family of ours has an entry or more here; tests of conversion, models and training go through all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SOME_WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 2,
    "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
}


@dataclass(frozen=True)
class Entry:
    """One model.

    Args:
        kind: the name of its configuration's class without "Config", in transformers.
        changes: of SIZES; a value of None leaves the class's own.
        tolerance: of losses beside transformers', relative.
    """

    kind: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-6


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ZOO: dict[str, Entry] = {
    "mistral, head_dim": Entry("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2, some windows": Entry("Qwen2", SOME_WINDOWS),
    "qwen3": Entry("Qwen3", {"head_dim": 10}),
    "qwen3, tied, biases, windows": Entry(
        "Qwen3",
        {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, **SOME_WINDOWS},
    ),
    "qwen3_moe": Entry(
        "Qwen3Moe", {"head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1], **_MOE}, 1e-5
    ),
    "qwen3_moe, plain weights": Entry("Qwen3Moe", {"decoder_sparse_step": 2, **_MOE}, 1e-5),
}


def save(name: str, root: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The entry's model with norms and biases that show. Skips where transformers lacks it."""
    import transformers

    entry = ZOO[name]
    config_class = getattr(transformers, f"{entry.kind}Config", None)
    model_class = getattr(transformers, f"{entry.kind}ForCausalLM", None)
    if config_class is None or model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {entry.kind}")
    torch.manual_seed(0)
    sizes = {**SIZES, **entry.changes}
    model = model_class(config_class(**sizes)).to(dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn_like(tensor))
    model.save_pretrained(root)
    return root
