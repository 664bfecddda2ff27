"""A ModelSpec in and out of Nanotron's model configuration classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.formats.fields import MAX_COUNT, MAX_SIZE, Fields
from nanotron_fast.formats.nanotron.class_fields import EXTENSION_FIELDS, FIELDS, FIELDS_1_2
from nanotron_fast.formats.rope import read_rope
from nanotron_fast.model.spec import ModelSpec, MoeSpec

_MARKERS = {
    "is_llama_config": "LlamaConfig",
    "is_qwen2_config": "Qwen2Config",
    "is_starcoder2_config": "Starcoder2Config",
}
CLASS_BY_OPTION = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "starcoder2": "Starcoder2Config",
}

# The field of a class that holds a field of ModelSpec, where it is not of the same name.
_LLAMA_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}
_STARCODER2_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_kv_heads",
    "norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
    "sliding_window": "sliding_window_size",
}
_KEYS = {
    "LlamaConfig": _LLAMA_KEYS,
    "Qwen2Config": _LLAMA_KEYS,
    "Starcoder2Config": _STARCODER2_KEYS,
}
# What Hugging Face's class does without asking.
_STARCODER2_FIXED = {
    "use_rotary_embeddings": True,
    "use_position_embeddings": False,
    "scale_attn_weights": True,
    "global_attn_layers": [],
}
_PLAIN = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "hidden_act",
    "initializer_range",
    "rope_theta",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "norm_eps",
)


def class_of(config: Mapping[str, Any]) -> str:
    """The class that a model_config.json was written from. Raises ConfigError."""
    for marker, name in _MARKERS.items():
        if config.get(marker):
            return name
    raise ConfigError(
        f"model_config.json: none of {', '.join(_MARKERS)} says which of Nanotron's classes it is"
    )


def first_token(value: Any, model_class: str, name: str) -> int | None:
    """The one id that Nanotron keeps: the first of a list; for null, the class's default."""
    if isinstance(value, list):
        value = value[0] if value else None
    return FIELDS[model_class].get(name) if value is None else value


def write_model_config(
    spec: ModelSpec, model_class: str, *, version: str, rope_interleaved: bool
) -> dict[str, Any]:
    """Every field of the class, in its order, and the extension's where it is needed.

    Raises UnsupportedModelError.
    """
    config = dict(FIELDS[model_class])
    if model_class == "Starcoder2Config":
        _fill_starcoder2(config, spec)
    else:
        _fill_llama(config, spec, model_class, rope_interleaved)
    if model_class == "Qwen2Config":
        config["sliding_window_size"] = spec.sliding_window
        config["no_rope_layer"] = spec.no_rope_interval
        config["moe_config"] = None if spec.moe is None else _moe_config(spec.moe)
    if version == "1.2":
        if model_class not in FIELDS_1_2:
            raise UnsupportedModelError(
                f"checkpoint version 1.2 (Nanotron 0.4) has no {model_class}: only "
                f"{' and '.join(FIELDS_1_2)}"
            )
        config = {name: config[name] for name in FIELDS_1_2[model_class]}
    if model_class == "LlamaConfig" and _is_extended(spec):
        values = (spec.head_dim, spec.has_output_bias, spec.has_mlp_bias)
        config.update(zip(EXTENSION_FIELDS, values, strict=True))
    return config


def _is_extended(spec: ModelSpec) -> bool:
    """Whether a LlamaConfig's own fields leave something about a model out."""
    return (
        spec.head_dim * spec.num_heads != spec.hidden_size
        or spec.has_qkv_bias
        or spec.has_output_bias
        or spec.has_mlp_bias
    )


def _fill_plain(config: dict[str, Any], spec: ModelSpec, model_class: str) -> None:
    for name in _PLAIN:
        config[_KEYS[model_class].get(name, name)] = getattr(spec, name)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in config:
            config[name] = first_token(getattr(spec, name), model_class, name)


def _fill_llama(
    config: dict[str, Any], spec: ModelSpec, model_class: str, rope_interleaved: bool
) -> None:
    _fill_plain(config, spec, model_class)
    config["attention_bias"] = spec.has_qkv_bias
    config["tie_word_embeddings"] = spec.tie_word_embeddings
    config["use_cache"] = spec.use_cache
    config["rope_interleaved"] = rope_interleaved
    config["rope_scaling"] = None if spec.rope_scaling is None else dict(spec.rope_scaling)
    pretraining_tp = spec.extras.get("pretraining_tp")
    config["pretraining_tp"] = 1 if pretraining_tp is None else pretraining_tp


def _fill_starcoder2(config: dict[str, Any], spec: ModelSpec) -> None:
    _fill_plain(config, spec, "Starcoder2Config")
    # An integer in the class, and Nanotron's YAML reader is strict about it.
    if spec.rope_theta == int(spec.rope_theta):
        config["rope_theta"] = int(spec.rope_theta)
    # The stock class never reads it, and every Starcoder2 checkpoint has the default.
    config["initializer_range"] = FIELDS["Starcoder2Config"]["initializer_range"]
    config["grouped_query"] = True
    config["global_attn_layers"] = []
    config["sliding_window_size"] = spec.sliding_window
    config["attn_pdrop"] = spec.extras.get("attention_dropout", 0.0)
    config["embd_pdrop"] = spec.extras.get("embedding_dropout", 0.0)
    config["resid_pdrop"] = spec.extras.get("residual_dropout", 0.0)


# Those of Nanotron's MoEConfig.
MOE_FIELDS = (
    "num_experts",
    "top_k",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "router_aux_loss_coef",
    "layers",
    "enable_shared_expert",
    "token_dispatcher_type",
)


def _moe_config(moe: MoeSpec) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "shared_expert_intermediate_size": moe.shared_intermediate_size,
        "router_aux_loss_coef": moe.router_aux_loss_coef,
        "layers": list(moe.layers),
        "enable_shared_expert": moe.has_shared_expert,
        "token_dispatcher_type": "alltoall",
    }


def read_model_config(
    config: Mapping[str, Any],
    *,
    head_dim: int | None = None,
    moe_sizes: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """The architecture of a model_config.json; absent fields have the class's defaults.

    `head_dim` and `moe_sizes`, which tensors show, stand in for fields that the config lacks.
    Raises ConfigError, UnsupportedModelError.
    """
    model_class = class_of(config)
    full = Fields("model_config.json", config, FIELDS[model_class])
    head_dim = full.positive_or_none("head_dim") or head_dim
    keys = _KEYS[model_class]
    fields: dict[str, Any] = {}
    for name in ("hidden_size", "num_layers", "num_heads", "vocab_size", "max_position_embeddings"):
        limit = MAX_COUNT if name == "num_layers" else MAX_SIZE
        fields[name] = full.positive(keys.get(name, name), limit)
    for name in ("initializer_range", "norm_eps"):
        fields[name] = full.number(keys.get(name, name))
    fields["rope_theta"], fields["rope_scaling"] = read_rope(full)
    fields["hidden_act"] = full.text(keys.get("hidden_act", "hidden_act"))
    num_kv_heads = full.positive_or_none(keys["num_kv_heads"])
    if num_kv_heads is None:
        num_kv_heads = 1 if full.get("multi_query") else fields["num_heads"]
    if fields["num_heads"] % num_kv_heads:
        raise full.error(keys["num_kv_heads"], f"a divisor of the {fields['num_heads']} heads")
    if head_dim is None and fields["hidden_size"] < fields["num_heads"]:
        raise full.error("hidden_size", f"at least the {fields['num_heads']} heads")
    fields["num_kv_heads"] = num_kv_heads
    intermediate_size = full.positive_or_none("intermediate_size")
    fields["intermediate_size"] = intermediate_size or 4 * fields["hidden_size"]
    fields["head_dim"] = head_dim or fields["hidden_size"] // fields["num_heads"]
    for name in ("bos_token_id", "eos_token_id"):
        fields[name] = full.token_ids(name)
    if model_class == "Starcoder2Config":
        if not full.flag("grouped_query"):
            raise UnsupportedModelError(
                "model_config.json: a Starcoder2 with multi_query keeps query and key-value "
                "weights apart; only grouped_query models are converted"
            )
        for name, value in _STARCODER2_FIXED.items():
            if full.get(name) != value:
                raise UnsupportedModelError(
                    f"model_config.json: {name} is {full.get(name)!r}: Hugging Face's Starcoder2 "
                    f"computes as if it were {value!r}"
                )
        return ModelSpec(
            **fields,
            tie_word_embeddings=True,
            has_qkv_bias=True,
            has_output_bias=True,
            has_mlp_bias=True,
            sliding_window=full.positive_or_none("sliding_window_size"),
            extras={
                "attention_dropout": full.number("attn_pdrop"),
                "embedding_dropout": full.number("embd_pdrop"),
                "residual_dropout": full.number("resid_pdrop"),
            },
        )
    factor = full.get("rope_seq_len_interpolation_factor")
    if factor not in (None, 1.0):
        raise UnsupportedModelError(
            f"model_config.json: rope_seq_len_interpolation_factor is {factor!r}: Nanotron divides "
            "positions by it, and the way to Hugging Face has no place for that"
        )
    return ModelSpec(
        **fields,
        pad_token_id=full.token_ids("pad_token_id"),
        tie_word_embeddings=full.flag("tie_word_embeddings"),
        use_cache=full.flag("use_cache"),
        has_qkv_bias=full.flag("attention_bias"),
        has_output_bias=full.flag_or_false("attention_output_bias"),
        has_mlp_bias=full.flag_or_false("mlp_bias"),
        sliding_window=full.positive_or_none("sliding_window_size"),
        no_rope_interval=full.positive_or_none("no_rope_layer"),
        moe=_read_moe(full.mapping("moe_config"), fields["num_layers"], moe_sizes or {}),
        extras={"pretraining_tp": full.integer("pretraining_tp")},
    )


def _read_moe(
    config: Mapping[str, Any] | None, num_layers: int, sizes: Mapping[str, Any]
) -> MoeSpec | None:
    if config is None:
        return None
    # Defaults of Nanotron's MoEConfig; those of its branches lack some fields.
    defaults = {
        "layers": [-1],
        "enable_shared_expert": False,
        "router_aux_loss_coef": 0.01,
        **sizes,
    }
    moe = Fields("model_config.json: moe_config", config, defaults)
    has_shared_expert = moe.flag("enable_shared_expert")
    layers = moe.indices("layers")
    if layers != [-1] and not set(layers) <= set(range(num_layers)):
        raise moe.error("layers", f"a list of layers, of which there are {num_layers}")
    shared_size = "shared_expert_intermediate_size"
    return MoeSpec(
        num_experts=moe.positive("num_experts", MAX_COUNT),
        top_k=moe.positive("top_k"),
        intermediate_size=moe.positive("moe_intermediate_size"),
        shared_intermediate_size=moe.positive(shared_size) if has_shared_expert else 0,
        has_shared_expert=has_shared_expert,
        layers=tuple(range(num_layers)) if layers == [-1] else tuple(layers),
        router_aux_loss_coef=moe.number("router_aux_loss_coef"),
    )


def rope_is_interleaved(config: Mapping[str, Any]) -> bool:
    """Whether rotary pairs lie beside each other. Raises ConfigError.

    Nanotron's Llama rotated neighbours, and had no option for it, until September 2024: version
    1.2 (without rope_theta) and the months of 1.4 that had rope_theta and no rope_interleaved.
    """
    is_old = class_of(config) == "LlamaConfig"
    fields = Fields("model_config.json", config, {"rope_interleaved": is_old})
    return fields.flag("rope_interleaved")
