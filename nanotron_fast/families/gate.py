"""What Nanotron would compute wrongly, or not at all, is refused here, with the way out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.family import Family
from nanotron_fast.families.model_types import like_llama, refusal_of
from nanotron_fast.formats.nanotron.classes import NanotronClass, classes
from nanotron_fast.model.needs import needs
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
    reason = refusal_of(str(model_type))
    if reason is None and like_llama(str(model_type)) is not None:
        reason = "it computes as a llama where its keys are neutral; --family llama, mistral or "
        reason += "qwen2 converts it where they are"
    why = f": {reason}" if reason else ""
    return UnsupportedModelError(
        f"config.json: model_type {model_type!r} is not supported{why}. "
        f"Supported: {', '.join(known)}. docs/adding-a-family.md shows how to add one"
    )


def choose_class(family: Family, spec: ModelSpec, option: str) -> NanotronClass:
    """The Nanotron class to write; `option` is --model-class. Raises UnsupportedModelError."""
    default = family.model_class
    if spec.sliding_window is not None and family.window_class is not None:
        default = family.window_class
    if option == "auto":
        return default
    by_option = {each.option: each for each in classes()}
    if option not in by_option:
        raise ConfigError(f"--model-class {option}: choose auto, {', '.join(by_option)}")
    wanted = by_option[option]
    if wanted is default or wanted in family.classes:
        has_window = spec.sliding_window is not None
        if has_window and not wanted.can_hold("sliding_window", is_extended=False):
            raise UnsupportedModelError(
                f"--model-class {option}: {wanted} has no sliding window, and this model has one "
                f"of {spec.sliding_window}; use --model-class {default.option}"
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
    model_class: NanotronClass,
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
    has_extension = (is_extended or states_extension) and family.has_extended_target
    for need in needs(spec):
        admits = is_extended if need == "rope_scaling" else has_extension
        if not model_class.can_hold(need, is_extended=admits):
            raise _refused(need, spec, model_class, family, is_extended)
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
    if rope_interleaved and not model_class.can_rotate_neighbours:
        raise UnsupportedModelError("--rope-interleaved: Starcoder2 rotates halves in Nanotron")
    is_old = version == "1.2" and model_class.rotates_neighbours_in_1_2
    if is_old and rope_interleaved is False:
        raise UnsupportedModelError(
            "--no-rope-interleaved: checkpoint version 1.2 (Nanotron 0.4) always rotates "
            "neighbours; use --checkpoint-version 1.5"
        )
    if is_old and spec.rope_theta != _ROPE_THETA_1_2:
        raise UnsupportedModelError(
            f"rope_theta {spec.rope_theta:g}: checkpoint version 1.2 (Nanotron 0.4) always "
            f"rotates with {_ROPE_THETA_1_2:g}; use --checkpoint-version 1.5"
        )


def _refused(
    need: str, spec: ModelSpec, model_class: NanotronClass, family: Family, is_extended: bool
) -> UnsupportedModelError:
    """Why a class cannot hold a model, and the way out where there is one."""
    hint = (
        "; --target nanotron-fast admits it, for conversion and load_into alone: nothing trains "
        "such a model yet"
        if family.has_extended_target
        else ""
    )
    scaling = spec.rope_scaling or {}
    reasons = {
        "rope_scaling": f"rope_scaling: {model_class} has no field for it"
        if is_extended
        else f"rope_scaling {scaling.get('rope_type', scaling.get('type'))!r}: Nanotron stores "
        "rope_scaling and ignores it, so the model would run with wrong frequencies. Use --target "
        "nanotron-fast, and train with nanotron-fast run --rope-scaling (the drop-in), which "
        "honours it",
        "head_dim": f"head_dim {spec.head_dim} is not hidden_size / heads = {spec.hidden_size} / "
        f"{spec.num_heads}, the only one that Nanotron has{hint}",
        "no_bias": "use_bias is false: Nanotron's Starcoder2 always has biases; there is no way to "
        "leave them out",
        "untied": "tie_word_embeddings is false: Nanotron's Starcoder2 always ties them",
        "output_bias": "attention_bias puts a bias on the attention's output projection, which "
        f"Nanotron does not have{hint}",
        "mlp_bias": "mlp_bias: the MLP has biases, and Nanotron's has none; there is no way to "
        "keep them",
        "qkv_bias": f"biases on q, k and v: Nanotron's {model_class} has none{hint}",
        "qk_norm": "its queries and keys are normalised (qk-norm), which Nanotron's "
        f"{model_class} does not do",
        "sliding_window": f"a sliding window of {spec.sliding_window}: Nanotron's {model_class} "
        "has none",
        "no_rope_layers": "layers without rotary embedding: Nanotron's "
        f"{model_class} rotates in all of them",
        "moe": f"a mixture of experts: Nanotron's {model_class} has none",
    }
    return UnsupportedModelError(reasons[need])


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
