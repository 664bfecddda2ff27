"""Multi-head latent attention: its tensors, and how `config.json` speaks of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanotron_fast.families.decoder import BLOCK, LAYER
from nanotron_fast.families.quirk import Quirk, set_attention
from nanotron_fast.families.rules import Copy, Rows, Rule
from nanotron_fast.formats.fields import Fields
from nanotron_fast.model.spec import Latent, ModelSpec

_HF, _OURS = f"{LAYER}self_attn.", f"{BLOCK}attn."


def _whole(hf: str, name: str, rows: str, columns: str | None, when: str | None) -> Copy:
    return Copy(f"{_HF}{hf}", f"{_OURS}{name}", rows=rows, columns=columns, when=when)


def _by_head(hf: str, rows: Rows, columns: str, when: str | None = None) -> Copy:
    return Copy(
        f"{_HF}{hf}.weight",
        f"{_OURS}{hf}.weight",
        rows=rows,
        columns=columns,
        split="rows",
        when=when,
    )


NORMS: tuple[Rule, ...] = tuple(
    Copy(f"{LAYER}{place}.weight", f"{BLOCK}{place}.weight", rows="hidden")
    for place in ("input_layernorm", "post_attention_layernorm")
)

PROJECTIONS: tuple[Rule, ...] = (
    _by_head("q_proj", ("heads", "head_dim"), "hidden", "no_q_rank"),
    _whole("q_a_proj.weight", "q_a_proj.weight", "q_rank", "hidden", "q_rank"),
    _whole("q_a_proj.bias", "q_a_proj.bias", "q_rank", None, "q_rank_bias"),
    _whole("q_a_layernorm.weight", "q_a_layernorm.weight", "q_rank", None, "q_rank"),
    _by_head("q_b_proj", ("heads", "head_dim"), "q_rank", "q_rank"),
    _whole("kv_a_proj_with_mqa.weight", "kv_a_proj.weight", "kv_rank_and_rotary", "hidden", None),
    _whole("kv_a_proj_with_mqa.bias", "kv_a_proj.bias", "kv_rank_and_rotary", None, "qkv_bias"),
    _whole("kv_a_layernorm.weight", "kv_a_layernorm.weight", "kv_rank", None, None),
    _by_head("kv_b_proj", ("heads", "key_and_value"), "kv_rank"),
    Copy(
        f"{_HF}o_proj.weight",
        f"{_OURS}o_proj.weight",
        rows="hidden",
        columns=("heads", "value_dim"),
        split="columns",
    ),
    Copy(f"{_HF}o_proj.bias", f"{_OURS}o_proj.bias", rows="hidden", when="output_bias"),
)


@dataclass(frozen=True, slots=True)
class LatentHeads(Quirk):
    """The sizes of latent attention, of every layer, and the scale that goes with YaRN."""

    keys: frozenset[str] = frozenset({"q_lora_rank", "kv_lora_rank"})
    expresses: frozenset[str] = frozenset({"partial_rotary"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Makes every layer's attention latent. Raises ConfigError."""
        plain, turned = reader.positive("qk_nope_head_dim"), reader.positive("qk_rope_head_dim")
        if turned % 2:
            raise reader.error("qk_rope_head_dim", "an even number")
        if fields["num_kv_heads"] != fields["num_heads"]:
            raise reader.error("num_key_value_heads", f"the number of heads, {fields['num_heads']}")
        latent = Latent(
            q_rank=reader.positive_or_none("q_lora_rank"),
            kv_rank=reader.positive("kv_lora_rank"),
            value_dim=reader.positive("v_head_dim"),
            rotates_neighbours=reader.flag("rope_interleave"),
        )
        if latent.value_dim > plain + turned:
            raise reader.error("v_head_dim", f"at most the {plain + turned} rows of a key's head")
        set_attention(
            fields,
            head_dim=plain + turned,
            rotary=(plain, plain + turned),
            latent=latent,
            scale=_scale(plain + turned, fields["rope_scaling"]),
        )

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds its keys."""
        latent, rotary = spec.attention.latent, spec.attention.rotary
        if latent is None or rotary is None:
            return
        config["q_lora_rank"], config["kv_lora_rank"] = latent.q_rank, latent.kv_rank
        config["qk_nope_head_dim"], config["v_head_dim"] = rotary[0], latent.value_dim
        config["qk_rope_head_dim"] = config["head_dim"] = rotary[1] - rotary[0]
        config["rope_interleave"] = latent.rotates_neighbours


def _scale(head_dim: int, scaling: Mapping[str, Any] | None) -> float | None:
    """Of the scores: YaRN's magnitude goes into both queries and keys, and so in twice."""
    factor = (scaling or {}).get("factor", 1)
    weight = (scaling or {}).get("mscale_all_dim") or 0
    if not weight or factor <= 1:
        return None
    magnitude = 0.1 * weight * math.log(factor) + 1.0
    return float(head_dim**-0.5 * magnitude * magnitude)
