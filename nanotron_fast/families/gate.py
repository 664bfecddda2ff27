"""What Nanotron would compute wrongly, or not at all, is refused here, with the way out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.family import Family
from nanotron_fast.families.model_types import LIKE_LLAMA, REFUSED
from nanotron_fast.formats.nanotron.classes import CLASS_BY_OPTION
from nanotron_fast.model.spec import NANOTRON_ACTIVATIONS, ModelSpec
from nanotron_fast.moves.dtypes import Dtype

TARGETS = ("nanotron", "nanotron-fast")
VERSIONS = ("1.5", "1.2")
_ROPE_THETA_1_2 = 10000.0
_QUANTIZATION = "quantization_config"
# Where a multimodal model's config keeps that of its language model.
_WRAPPED = ("text_config", "llm_config", "language_config", "thinker_config")


def unknown_family(model_type: object, known: list[str]) -> UnsupportedModelError:
    """The error for a model type without a table."""
    reason = REFUSED.get(str(model_type))
    if reason is None and str(model_type) in LIKE_LLAMA:
        reason = "it computes as a llama where its keys are neutral; --family llama, mistral or "
        reason += "qwen2 converts it where they are"
    why = f": {reason}" if reason else ""
    return UnsupportedModelError(
        f"config.json: model_type {model_type!r} is not supported{why}. "
        f"Supported: {', '.join(known)}. docs/adding-a-family.md shows how to add one"
    )


def choose_class(family: Family, spec: ModelSpec, option: str) -> str:
    """The Nanotron class to write; `option` is --model-class. Raises UnsupportedModelError."""
    default = family.model_class
    if spec.sliding_window is not None and family.window_class is not None:
        default = family.window_class
    if option == "auto":
        return default
    if option not in CLASS_BY_OPTION:
        raise ConfigError(f"--model-class {option}: choose auto, {', '.join(CLASS_BY_OPTION)}")
    wanted = CLASS_BY_OPTION[option]
    if wanted == default or wanted in family.other_classes:
        if wanted == "LlamaConfig" and spec.sliding_window is not None:
            raise UnsupportedModelError(
                f"--model-class {option}: LlamaConfig has no sliding window, and this model has "
                f"one of {spec.sliding_window}; use --model-class qwen2"
            )
        return wanted
    raise UnsupportedModelError(
        f"--model-class {option}: {wanted} cannot hold a {family.name} model; use "
        f"--model-class auto ({default})"
    )


def check_config(
    config: Mapping[str, Any], dtypes: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Refuses what a config says of its tensors; returns it as it is to be read, and warnings.

    `dtypes` are those of the tensors, by their safetensors names. Raises UnsupportedModelError.
    """
    for key in _WRAPPED:
        inner = config.get(key)
        if isinstance(inner, Mapping) and "hidden_size" not in config:
            raise UnsupportedModelError(
                f"config.json: model_type {config.get('model_type')!r} wraps a language model "
                f"({key}: {inner.get('model_type', 'no model_type')!r}) together with others, as "
                "multimodal models do. Save the language model alone: load the whole in "
                "transformers, put model.language_model into the CausalLM class of its kind, and "
                "convert what save_pretrained writes"
            )
    kept, warnings = dict(config), []
    quantization = config.get(_QUANTIZATION)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        method = method or _QUANTIZATION
        if not all(dtype in Dtype.__members__ for dtype in dtypes):
            raise UnsupportedModelError(
                f"config.json: the weights are quantised ({method}), which "
                "Nanotron cannot train; start from the unquantised model"
            )
        warnings.append(
            f"config.json: {_QUANTIZATION} ({method}) is left out: every tensor is in floating "
            "point, so nothing is quantised"
        )
        del kept[_QUANTIZATION]
    return kept, warnings


def check_model(
    family: Family,
    spec: ModelSpec,
    model_class: str,
    *,
    target: str,
    version: str,
    rope_interleaved: bool | None,
    states_extension: bool = False,
) -> None:
    """Refuses a model that the chosen target cannot hold. Raises UnsupportedModelError.

    `rope_interleaved` is the layout to write; None for a checkpoint that has one already.
    `states_extension`: it has fields for what its class lacks, which then need no other target.
    """
    if target not in TARGETS:
        raise ConfigError(f"--target {target}: choose {' or '.join(TARGETS)}")
    if version not in VERSIONS:
        raise ConfigError(f"--checkpoint-version {version}: choose {' or '.join(VERSIONS)}")
    is_extended = target == "nanotron-fast"
    extended_hint = (
        "; --target nanotron-fast admits it, for conversion and load_into alone: nothing trains "
        "such a model yet"
        if family.has_extended_target
        else ""
    )
    if spec.rope_scaling is not None and not is_extended:
        kind = spec.rope_scaling.get("rope_type", spec.rope_scaling.get("type"))
        raise UnsupportedModelError(
            f"rope_scaling {kind!r}: Nanotron stores rope_scaling and ignores it, so the model "
            "would run with wrong frequencies. Use --target nanotron-fast, and train with "
            "nanotron-fast run --rope-scaling (the drop-in), which honours it"
        )
    if spec.rope_scaling is not None and model_class == "Starcoder2Config":
        raise UnsupportedModelError("rope_scaling: Starcoder2Config has no field for it")
    allows_extension = (
        (is_extended or states_extension)
        and family.has_extended_target
        and model_class == "LlamaConfig"
    )
    if spec.head_dim * spec.num_heads != spec.hidden_size and not allows_extension:
        raise UnsupportedModelError(
            f"head_dim {spec.head_dim} is not hidden_size / heads = {spec.hidden_size} / "
            f"{spec.num_heads}, the only one that Nanotron has{extended_hint}"
        )
    if model_class == "Starcoder2Config":
        _check_starcoder2(spec)
    else:
        if spec.has_output_bias and not allows_extension:
            raise UnsupportedModelError(
                f"attention_bias puts a bias on the attention's output projection, which "
                f"Nanotron does not have{extended_hint}"
            )
        if spec.has_mlp_bias:
            raise UnsupportedModelError(
                "mlp_bias: the MLP has biases, and Nanotron's has none; there is no way to keep "
                "them"
            )
        if spec.has_qkv_bias and model_class == "LlamaConfig" and not allows_extension:
            raise UnsupportedModelError(
                f"biases on q, k and v: Nanotron's LlamaConfig has none{extended_hint}"
            )
    if spec.hidden_act not in NANOTRON_ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act {spec.hidden_act!r} is not one of Nanotron's: "
            f"{' '.join(sorted(NANOTRON_ACTIVATIONS))}"
        )
    if spec.no_rope_interval is not None and spec.sliding_window is not None:
        raise UnsupportedModelError(
            f"a sliding window of {spec.sliding_window} together with layers without rotary "
            "embedding: Nanotron drops the window on those layers"
        )
    if rope_interleaved and model_class == "Starcoder2Config":
        raise UnsupportedModelError("--rope-interleaved: Starcoder2 rotates halves in Nanotron")
    if version == "1.2" and model_class == "LlamaConfig" and rope_interleaved is False:
        raise UnsupportedModelError(
            "--no-rope-interleaved: checkpoint version 1.2 (Nanotron 0.4) always rotates "
            "neighbours; use --checkpoint-version 1.5"
        )
    if version == "1.2" and model_class == "LlamaConfig" and spec.rope_theta != _ROPE_THETA_1_2:
        raise UnsupportedModelError(
            f"rope_theta {spec.rope_theta:g}: checkpoint version 1.2 (Nanotron 0.4) always "
            f"rotates with {_ROPE_THETA_1_2:g}; use --checkpoint-version 1.5"
        )


def _check_starcoder2(spec: ModelSpec) -> None:
    if not (spec.has_qkv_bias and spec.has_output_bias and spec.has_mlp_bias):
        raise UnsupportedModelError(
            "use_bias is false: Nanotron's Starcoder2 always has biases; there is no way to leave "
            "them out"
        )
    if not spec.tie_word_embeddings:
        raise UnsupportedModelError(
            "tie_word_embeddings is false: Nanotron's Starcoder2 always ties them"
        )


def check_expressible(family: Family, spec: ModelSpec) -> None:
    """Refuses what a family's Hugging Face class has no place for. Raises UnsupportedModelError."""

    def refuse(what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{family.name}: {what}; choose another family with --family")

    if family.qkv_bias is False and spec.has_qkv_bias:
        raise refuse("the checkpoint has biases on q, k and v, and Hugging Face's class has none")
    if family.qkv_bias is True and not spec.has_qkv_bias:
        raise refuse(
            "the checkpoint has no biases on q, k and v, and Hugging Face's class has them"
        )
    if family.qkv_bias == family.output_bias and spec.has_qkv_bias != spec.has_output_bias:
        raise refuse(
            "the checkpoint has biases on q, k and v but not on the output projection, and Hugging "
            "Face's class has both or none"
        )
    if family.window is None and spec.sliding_window is not None:
        raise refuse(f"Hugging Face's class has no sliding window (here {spec.sliding_window})")
    if not family.has_no_rope_layers and spec.no_rope_interval is not None:
        raise refuse("every layer has a rotary embedding in Hugging Face's class")
    if family.is_moe != (spec.moe is not None):
        raise refuse(
            "the checkpoint has experts"
            if spec.moe is not None
            else "the checkpoint has no experts"
        )
    if spec.moe is not None and not spec.moe.has_shared_expert:
        raise refuse("Hugging Face's class has a shared expert, and the checkpoint has none")
