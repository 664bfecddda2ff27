"""Between a `config.json` and a ModelSpec, for any family.

A key that is absent has the default of transformers' class: version 4 writes only what differs
from it. Version 5 writes `rope_parameters` in place of `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.family import Family
from nanotron_fast.families.model_types import NEUTRAL
from nanotron_fast.families.windows import check_no_windows, read_kinds
from nanotron_fast.formats.fields import MAX_COUNT, MAX_SIZE, Fields
from nanotron_fast.formats.rope import must_agree
from nanotron_fast.model.spec import Attention, Dense, Layer, ModelSpec
from nanotron_fast.moves.dtypes import Dtype

_POSITIVE = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "vocab_size",
    "num_kv_heads",
    "max_position_embeddings",
)
# What ModelSpec keeps for each layer.
_OF_LAYERS = ("num_layers", "num_heads", "num_kv_heads")


class _Reader(Fields):
    """`config.json`, with the family's defaults."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        super().__init__("config.json", config, family.defaults)
        self.family = family

    def bias(self, key: str | bool) -> bool:
        """Whether there is a bias: known of the family, or told by a key."""
        return key if isinstance(key, bool) else self.flag(key)


def read_config(family: Family, config: Mapping[str, Any]) -> ModelSpec:
    """The architecture that a config describes. Raises ConfigError, UnsupportedModelError."""
    newer = {
        old: config[new]
        for new, old in family.renamed.items()
        if new in config and old not in config
    }
    reader = _Reader(family, {**config, **newer})
    keys = family.config_keys
    fields: dict[str, Any] = {}
    for name in _POSITIVE:
        if name == "num_kv_heads" and reader.get(keys[name]) is None:
            fields[name] = fields["num_heads"]
        else:
            limit = MAX_COUNT if name == "num_layers" else MAX_SIZE
            fields[name] = reader.positive(keys[name], limit)
    for name in ("norm_eps", "initializer_range"):
        fields[name] = reader.number(keys[name])
    fields["hidden_act"] = reader.text(keys["hidden_act"])
    for name in ("tie_word_embeddings", "use_cache"):
        fields[name] = reader.flag(keys[name])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields[name] = reader.token_ids(keys[name])
    hidden_size, num_heads, num_kv_heads = (
        fields["hidden_size"],
        fields["num_heads"],
        fields["num_kv_heads"],
    )
    head_dim = reader.get("head_dim")
    if head_dim is None and hidden_size % num_heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden_size} does not divide by {num_heads} heads"
        )
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"config.json: {num_heads} heads do not divide by {num_kv_heads} key-value heads"
        )
    head_dim = hidden_size // num_heads if head_dim is None else reader.positive("head_dim")
    fields["rope_theta"], fields["rope_scaling"] = family.rope(reader)
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary=(0, head_dim),
        has_qkv_bias=reader.bias(family.qkv_bias),
        has_output_bias=reader.bias(family.output_bias),
        qk_norm=family.qk_norm,
    )
    has_bias = reader.bias(family.mlp_bias)
    mlp = Dense(fields["intermediate_size"], has_bias, is_gated=family.has_gated_mlp)
    fields["norm"], fields["norm_adds_one"] = family.norm, family.norm_adds_one
    num_layers = fields["num_layers"]
    fields["layers"] = [Layer(attention, mlp, family.norms)] * num_layers
    if "sliding_window" not in family.expresses:
        check_no_windows(read_kinds(reader, num_layers), f"a {family.name} has none")
    for quirk in family.quirks:
        quirk.read(reader, fields)
    fields["layers"] = tuple(fields["layers"])
    for name in _OF_LAYERS:
        del fields[name]
    _check_agreement(reader)
    for key in family.extras:
        if reader.get(key) is not None:
            reader.number(key)
    fields["extras"] = {key: reader.get(key) for key in family.extras}
    spec = ModelSpec(**fields)
    for key in family.neutral:
        if not NEUTRAL[key](reader.get(key), spec):
            raise UnsupportedModelError(
                f"config.json: {key} is {reader.get(key)!r}, and no model of this package's, nor "
                "Nanotron's, computes with it"
            )
    return spec


def _check_agreement(reader: _Reader) -> None:
    """Refuses fields that say the same thing twice, and not alike. Raises ConfigError."""
    config = reader.config
    dtypes = {
        key: str(config[key]).removeprefix("torch.")
        for key in ("dtype", "torch_dtype")
        if config.get(key) is not None
    }
    if dtypes:
        must_agree("config.json", "the dtype", dtypes)
    for key, aliases in reader.family.aliases.items():
        others = {name: config[name] for name in aliases if config.get(name) is not None}
        if others:
            place = key if key in config else f"{key}, which is absent (its default)"
            must_agree("config.json", key, {place: reader.get(key), **others})
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        for key in sorted({*reader.family.config_keys.values(), *reader.defaults, "head_dim"}):
            if inner.get(key) is not None and key in config:
                places = {key: config[key], f"text_config.{key}": inner[key]}
                must_agree("config.json", key, places)


def write_config(family: Family, spec: ModelSpec, dtype: Dtype) -> dict[str, Any]:
    """A `config.json` that transformers 4 and 5 both read as this architecture."""
    keys = family.config_keys
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "torch_dtype": dtype.torch_name,
    }
    for name, key in keys.items():
        config[key] = getattr(spec, name)
    config["rope_theta"] = spec.rope_theta
    config["rope_scaling"] = None if spec.rope_scaling is None else dict(spec.rope_scaling)
    for bias, value in (
        (family.qkv_bias, spec.has_qkv_bias),
        (family.output_bias, spec.has_output_bias),
        (family.mlp_bias, spec.has_mlp_bias),
    ):
        if isinstance(bias, str):
            config[bias] = value
    if spec.head_dim * spec.num_heads != spec.hidden_size or family.writes_head_dim:
        config["head_dim"] = spec.head_dim
    for quirk in family.quirks:
        quirk.write(config, spec)
    config.update({key: spec.extras[key] for key in family.extras if key in spec.extras})
    return config
