"""Between a `config.json` and a ModelSpec, for any family.

A key that is absent has the default of transformers' class: version 4 writes only what differs
from it. Version 5 writes `rope_parameters` in place of `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.family import Family
from nanotron_fast.families.layer_kinds import read_no_rope_interval, read_window
from nanotron_fast.formats.fields import MAX_COUNT, MAX_SIZE, Fields
from nanotron_fast.formats.rope import must_agree, read_rope
from nanotron_fast.model.spec import ModelSpec, MoeSpec
from nanotron_fast.moves.dtypes import Dtype

_REQUIRED = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "vocab_size")
_POSITIVE = (*_REQUIRED, "num_kv_heads", "max_position_embeddings")
# Other names under which some classes keep what a mixture of experts has.
_EXPERT_ALIASES = {
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_topk", "moe_k"),
}


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
    reader = _Reader(family, config)
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
    fields["head_dim"] = (
        hidden_size // num_heads if head_dim is None else reader.positive("head_dim")
    )
    fields["rope_theta"], fields["rope_scaling"] = read_rope(reader)
    fields["has_qkv_bias"] = reader.bias(family.qkv_bias)
    fields["has_output_bias"] = reader.bias(family.output_bias)
    fields["has_mlp_bias"] = reader.bias(family.mlp_bias)
    fields["has_qk_norm"] = family.has_qk_norm
    num_layers = fields["num_layers"]
    if family.has_no_rope_layers:
        fields["no_rope_interval"] = read_no_rope_interval(reader, num_layers)
    fields["sliding_window"] = read_window(reader, family, num_layers)
    if family.is_moe:
        fields["moe"] = _read_moe(reader, num_layers)
    _check_agreement(reader)
    for key in family.extras:
        if reader.get(key) is not None:
            reader.number(key)
    fields["extras"] = {key: reader.get(key) for key in family.extras}
    return ModelSpec(**fields)


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
    if reader.family.is_moe:
        for key, aliases in _EXPERT_ALIASES.items():
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


def other_names(family: Family, key: str) -> tuple[str, ...]:
    """Under which a config may say a key's value once more."""
    return _EXPERT_ALIASES.get(key, ()) if family.is_moe else ()


def _read_moe(reader: _Reader, num_layers: int) -> MoeSpec:
    if reader.flag("norm_topk_prob"):
        raise UnsupportedModelError(
            "config.json: norm_topk_prob is true. Nanotron does not renormalise the weights of the "
            "chosen experts, and would compute something else"
        )
    step = reader.positive("decoder_sparse_step")
    dense = set(reader.indices("mlp_only_layers"))
    num_experts = reader.positive("num_experts", MAX_COUNT)
    top_k = reader.positive("num_experts_per_tok")
    if top_k > num_experts:
        raise ConfigError(
            f"config.json: num_experts_per_tok is {top_k}, and num_experts is {num_experts}: no "
            "token can be sent to more experts than there are"
        )
    return MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=reader.positive("moe_intermediate_size"),
        shared_intermediate_size=reader.positive("shared_expert_intermediate_size"),
        has_shared_expert=True,
        layers=tuple(
            layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0
        ),
        router_aux_loss_coef=reader.number("router_aux_loss_coef"),
    )


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
    if spec.head_dim * spec.num_heads != spec.hidden_size or family.name in ("llama", "mistral"):
        config["head_dim"] = spec.head_dim
    if family.window == "plain":
        config["sliding_window"] = spec.sliding_window
    elif family.window == "qwen":
        config["use_sliding_window"] = spec.sliding_window is not None
        config["sliding_window"] = spec.sliding_window
        # Windows start at this layer: at the first, or never.
        config["max_window_layers"] = 0 if spec.sliding_window is not None else spec.num_layers
        if spec.sliding_window is not None:
            # What max_window_layers means is another thing in each class and version.
            config["layer_types"] = ["sliding_attention"] * spec.num_layers
    if family.has_no_rope_layers:
        interval = spec.no_rope_interval
        config["no_rope_layers"] = [
            int(interval is None or (layer + 1) % interval != 0) for layer in range(spec.num_layers)
        ]
        if interval is not None:
            config["no_rope_layer_interval"] = interval
    if spec.moe is not None:
        config.update(_write_moe(spec.moe, spec.num_layers))
    config.update({key: spec.extras[key] for key in family.extras if key in spec.extras})
    return config


def _write_moe(moe: MoeSpec, num_layers: int) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "shared_expert_intermediate_size": moe.shared_intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(num_layers) if layer not in moe.layers],
        "norm_topk_prob": False,
        "router_aux_loss_coef": moe.router_aux_loss_coef,
    }
