"""Sizes that a Nanotron checkpoint's tensors show, where its configuration does not say them."""

from __future__ import annotations

from nanotron_fast.formats.nanotron.checkpoint import NanotronCheckpoint

_QKV = "attn.qkv_proj.weight"
_DOWN = "mlp.experts.merged_down_proj"
_SHARED_DOWN = "mlp.shared_expert.down_proj.weight"


def has_param(source: NanotronCheckpoint, ending: str) -> bool:
    """Whether some layer has a parameter of that name."""
    return any(name.endswith(ending) for name in source.params)


def _length(source: NanotronCheckpoint, ending: str, rank: int, dim: int, *, is_split: bool) -> int:
    """A dimension of the first such parameter, over all of its shards; 0 where there is none.

    Shards are equally long, and some may be of ranks whose files are not there.
    """
    for name, shards in source.params.items():
        if name.endswith(ending):
            lengths = [shard.info.shape[dim] for shard in shards if len(shard.info.shape) == rank]
            if is_split and name in source.sharded:
                return sum(lengths) * source.tp // len(shards)
            return max(lengths, default=0)
    return 0


def head_dim_of(source: NanotronCheckpoint) -> int | None:
    """The size of a head by the rows of the packed projection."""
    heads = source.model_config.get("num_attention_heads")
    kv_heads = source.model_config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads + 2 * kv_heads <= 0:
        return None
    head_dim, rest = divmod(_length(source, _QKV, 2, 0, is_split=True), heads + 2 * kv_heads)
    return head_dim if head_dim and not rest else None


def moe_sizes_of(source: NanotronCheckpoint) -> dict[str, int | bool]:
    """Fields of a moe_config: experts are (experts, rows, hidden), a shared one (hidden, rows)."""
    sizes = {
        "num_experts": _length(source, _DOWN, 3, 0, is_split=False),
        "moe_intermediate_size": _length(source, _DOWN, 3, 1, is_split=False),
        "shared_expert_intermediate_size": _length(source, _SHARED_DOWN, 2, 1, is_split=True),
    }
    found: dict[str, int | bool] = {name: size for name, size in sizes.items() if size}
    return {**found, "enable_shared_expert": has_param(source, _SHARED_DOWN)}
