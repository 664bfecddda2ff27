"""Between a `config.json` and a ModelSpec, for any family.

A key that is absent has the default of transformers' class: version 4 writes only what differs
from it. Version 5 writes `rope_parameters` in place of `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanotron_fast.dtypes import Dtype
from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.family import Family
from nanotron_fast.families.fields import MAX_COUNT, MAX_SIZE, Fields, is_number
from nanotron_fast.spec import ModelSpec, MoeSpec

_REQUIRED = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "vocab_size")
_POSITIVE = (*_REQUIRED, "num_kv_heads", "max_position_embeddings")


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
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden_size} does not divide by {num_heads} heads"
        )
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"config.json: {num_heads} heads do not divide by {num_kv_heads} key-value heads"
        )
    head_dim = config.get("head_dim")
    fields["head_dim"] = (
        hidden_size // num_heads if head_dim is None else reader.positive("head_dim")
    )
    fields["rope_theta"], fields["rope_scaling"] = _read_rope(reader)
    fields["has_qkv_bias"] = reader.bias(family.qkv_bias)
    fields["has_output_bias"] = reader.bias(family.output_bias)
    fields["has_mlp_bias"] = reader.bias(family.mlp_bias)
    num_layers = fields["num_layers"]
    if family.has_no_rope_layers:
        fields["no_rope_interval"] = _read_no_rope_interval(reader, num_layers)
    fields["sliding_window"] = _read_window(reader, num_layers)
    if family.is_moe:
        fields["moe"] = _read_moe(reader, num_layers)
    for key in family.extras:
        if reader.get(key) is not None:
            reader.number(key)
    fields["extras"] = {key: reader.get(key) for key in family.extras}
    return ModelSpec(**fields)


def _read_rope(reader: _Reader) -> tuple[float, Mapping[str, Any] | None]:
    parameters = reader.config.get("rope_parameters")
    scaling = reader.config.get("rope_scaling")
    theta = reader.get("rope_theta")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise reader.error("rope_parameters", "an object")
    if parameters is not None:
        if any(isinstance(value, Mapping) for value in parameters.values()):
            raise UnsupportedModelError(
                "config.json: rope_parameters differ between kinds of layers, and Nanotron has one "
                "rotary embedding for all of them"
            )
        theta = parameters.get("rope_theta", theta)
        old = scaling
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        if old and _without_old_name(old) != _without_old_name(scaling):
            # Version 4 knows the one, and version 5 lets it win.
            raise ConfigError(
                "config.json: rope_scaling and rope_parameters say different things: leave one out"
            )
    if not is_number(theta) or theta <= 0:
        raise ConfigError(f"config.json: rope_theta is {theta!r}, and should be a positive number")
    if isinstance(scaling, Mapping):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        factor = scaling.get("partial_rotary_factor", 1.0)
        if factor != 1.0:
            _refuse_partial_rotary(factor)
        if kind == "default":
            scaling = None
    elif scaling is not None:
        raise ConfigError(f"config.json: rope_scaling is {scaling!r}, and should be an object")
    partial = reader.config.get("partial_rotary_factor")
    if partial is not None and partial != 1.0:
        _refuse_partial_rotary(partial)
    return float(theta), scaling


def _without_old_name(scaling: object) -> object:
    """A scaling without what both versions need not say alike: `type`, the theta."""
    if not isinstance(scaling, Mapping):
        return scaling
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    named = {**scaling, "rope_type": kind}
    return {key: value for key, value in named.items() if key not in ("type", "rope_theta")}


def _refuse_partial_rotary(factor: object) -> None:
    raise UnsupportedModelError(
        f"config.json: partial_rotary_factor is {factor!r}: Nanotron rotates whole heads only"
    )


def _no_rope_layers(reader: _Reader, num_layers: int) -> list[int]:
    """The layers without rotary embedding."""
    listed = reader.config.get("no_rope_layers")
    if listed is None:
        interval = reader.positive("no_rope_layer_interval")
        return [layer for layer in range(num_layers) if (layer + 1) % interval == 0]
    if not isinstance(listed, list) or any(has_rope not in (0, 1) for has_rope in listed):
        raise ConfigError(
            f"config.json: no_rope_layers is {listed!r}, and should be a list of 0 and 1"
        )
    if len(listed) != num_layers:
        raise ConfigError(
            f"config.json: no_rope_layers has {len(listed)} entries for {num_layers} layers"
        )
    return [layer for layer, has_rope in enumerate(listed) if not has_rope]


def _read_no_rope_interval(reader: _Reader, num_layers: int) -> int | None:
    without = _no_rope_layers(reader, num_layers)
    if not without:
        return None
    interval = without[0] + 1
    regular = [layer for layer in range(num_layers) if (layer + 1) % interval == 0]
    if without != regular or num_layers % interval:
        raise UnsupportedModelError(
            f"config.json: no_rope_layers leaves rotary embeddings out of layers {without} of "
            f"{num_layers}. Nanotron leaves them out of every n-th layer, where n divides the "
            "number of layers (no_rope_layer)"
        )
    return interval


def _read_window(reader: _Reader, num_layers: int) -> int | None:
    family = reader.family
    if family.window is None:
        return None
    if family.window == "qwen":
        if not reader.flag("use_sliding_window") or reader.get("sliding_window") is None:
            return None
        windowed = _windowed_layers(reader, num_layers)
        if not any(windowed):
            return None
        if not all(windowed):
            raise UnsupportedModelError(
                f"config.json: {sum(windowed)} of {num_layers} layers have a sliding window. "
                "Nanotron has one on all layers or on none"
            )
    elif reader.get("sliding_window") is None:
        return None
    return reader.positive("sliding_window")


def _windowed_layers(reader: _Reader, num_layers: int) -> list[bool]:
    """Whether each layer has a window, where windows are in use."""
    kinds = reader.config.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
            raise ConfigError(
                f"config.json: layer_types is {kinds!r}, and should be a list of "
                f"{' and '.join(known)}"
            )
        if len(kinds) != num_layers:
            raise ConfigError(
                f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers"
            )
        return [kind == "sliding_attention" for kind in kinds]
    if reader.family.is_moe:
        raise UnsupportedModelError(
            "config.json: use_sliding_window without layer_types: transformers 4 puts the window "
            "on the layers from max_window_layers on, transformers 5 on every other layer before "
            "it; say which with layer_types"
        )
    if reader.family.has_no_rope_layers:
        without = _no_rope_layers(reader, num_layers)
        return [layer in without for layer in range(num_layers)]
    first = reader.get("max_window_layers")
    first = 0 if first is None else reader.integer("max_window_layers")
    return [layer >= first for layer in range(num_layers)]


def _read_moe(reader: _Reader, num_layers: int) -> MoeSpec:
    if reader.flag("norm_topk_prob"):
        raise UnsupportedModelError(
            "config.json: norm_topk_prob is true. Nanotron does not renormalise the weights of the "
            "chosen experts, and would compute something else"
        )
    step = reader.positive("decoder_sparse_step")
    dense = set(reader.indices("mlp_only_layers"))
    return MoeSpec(
        num_experts=reader.positive("num_experts", MAX_COUNT),
        top_k=reader.positive("num_experts_per_tok"),
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
