"""torchtitan's names of a Llama's tensors.

Its rows of wq and wk have the two of a rotary pair beside each other, as Meta's own have: row
2 * i + p of a head is row p * head_dim / 2 + i in Hugging Face. All else is the same matrix under
another name. Source: torchtitan, torchtitan/models/llama3/state_dict_adapter.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# What of torchtitan's models has such rows: its other families rotate halves.
MODEL_TYPE = "llama"

_OUTER = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_LAYER = {
    "self_attn.q_proj.weight": "attention.qkv_linear.wq.weight",
    "self_attn.k_proj.weight": "attention.qkv_linear.wk.weight",
    "self_attn.v_proj.weight": "attention.qkv_linear.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
# As they were until torchtitan 0.2.2, and are in checkpoints of that time.
_OLD_OUTER = {**_OUTER, "lm_head.weight": "output.weight"}
_OLD_IN_LAYER = {name: other.replace("qkv_linear.", "") for name, other in _IN_LAYER.items()}
_TABLES: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
    "torchtitan": (_OUTER, _IN_LAYER),
    "torchtitan-0.2": (_OLD_OUTER, _OLD_IN_LAYER),
}
# What a caller may call the ways of naming.
NAMINGS = tuple(_TABLES)

# Names that no other layout has.
EMBEDDING = _OUTER["model.embed_tokens.weight"]
# Tables of angles, which are computed anew.
_BUFFERS = ("freqs_cis", "rope.cache")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")


def hf_name(name: str) -> str | None:
    """Hugging Face's name of a tensor that torchtitan names so, now or in 0.2; None if unknown."""
    return _TO_HF_OUTER.get(name) or _in_layer(name, _TO_HF_IN_LAYER, "model.layers")


def torchtitan_name(name: str, naming: str) -> str | None:
    """One of `NAMINGS` of a tensor, by Hugging Face's name; None where torchtitan has no such."""
    outer, in_layer = _TABLES[naming]
    return outer.get(name) or _in_layer(name, in_layer, "layers")


def is_buffer(name: str) -> bool:
    """Whether it is a table of angles, which old checkpoints keep among the weights."""
    return any(name == buffer or name.endswith(f".{buffer}") for buffer in _BUFFERS)


def _in_layer(name: str, table: Mapping[str, str], prefix: str) -> str | None:
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in table:
        return None
    return f"{prefix}.{found[1]}.{table[found[2]]}"


def _inverse(tables: tuple[Mapping[str, str], ...]) -> dict[str, str]:
    return {other: name for table in tables for name, other in table.items()}


_TO_HF_OUTER = _inverse((_OUTER, _OLD_OUTER))
_TO_HF_IN_LAYER = _inverse((_IN_LAYER, _OLD_IN_LAYER))
