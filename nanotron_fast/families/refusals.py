"""What Nanotron would compute wrongly, or not at all, is refused here, with the way out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nanotron_fast.errors import ConfigError, TopologyError, UnsupportedModelError
from nanotron_fast.families.family import Family
from nanotron_fast.families.model_types import AS_LLAMA, like_llama, refusal_of
from nanotron_fast.families.parts import Param
from nanotron_fast.formats.huggingface.quantization import QUANTIZATION, read_quantization
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG, NanotronClass, classes
from nanotron_fast.model.needs import ODDITIES, needs
from nanotron_fast.model.spec import LEARNED_ACTIVATIONS, NANOTRON_ACTIVATIONS, ModelSpec
from nanotron_fast.moves.dtypes import Dtype

TARGETS = ("nanotron", "nanotron-fast")
VERSIONS = ("1.5", "1.2")
_ROPE_THETA_1_2 = 10000.0
# Where a multimodal model's config keeps that of its language model.
_WRAPPED = ("text_config", "llm_config", "language_config", "thinker_config")


def unknown_family(model_type: object, known: list[str]) -> UnsupportedModelError:
    """The error for a model type without a table."""
    reason = refusal_of(str(model_type))
    if reason is None and like_llama(str(model_type)) is not None:
        reason = AS_LLAMA
    why = f": {reason}" if reason else ""
    return UnsupportedModelError(
        f"config.json: model_type {model_type!r} is not supported{why}. "
        f"Supported: {', '.join(known)}. docs/adding-a-family.md shows how to add one"
    )


def target_of(family: Family, target: str | None) -> str:
    """Who shall run a model: --target, by default whoever can. Raises UnsupportedModelError."""
    if target is None:
        return "nanotron" if family.model_class.is_stock else "nanotron-fast"
    if target == "nanotron" and not family.model_class.is_stock:
        raise UnsupportedModelError(
            f"--target nanotron: none of Nanotron's classes can load a {family.name}; without the "
            "option it is converted for nanotron-fast train"
        )
    return target


def choose_class(
    family: Family, spec: ModelSpec, option: str, target: str, *, tp: int = 1
) -> NanotronClass:
    """The class to write; `option` is --model-class. UnsupportedModelError.

    For nanotron-fast that is this package's own where Nanotron's cannot hold the model, or not over
    `tp` ranks.
    """
    default = family.model_class
    if any(spec.windows) and family.window_class is not None:
        default = family.window_class
    if option == "auto":
        if target == "nanotron-fast" and (
            _lacks(default, spec, target) or spec.copies_of_kv_heads(tp) > 1
        ):
            return NANOTRON_FAST_CONFIG
        return default
    by_option = {each.option: each for each in classes()}
    if option not in by_option:
        raise ConfigError(f"--model-class {option}: choose auto, {', '.join(by_option)}")
    wanted = by_option[option]
    if not wanted.is_stock:
        if target != "nanotron-fast":
            raise UnsupportedModelError(
                f"--model-class {option}: Nanotron does not have {wanted}; it goes with --target "
                "nanotron-fast"
            )
        return wanted
    if wanted is default or wanted in family.classes:
        if any(spec.windows) and not wanted.can_hold("sliding_window"):
            raise UnsupportedModelError(
                f"--model-class {option}: {wanted} has no sliding window, and this model has one "
                f"of {spec.sliding_window}; use --model-class {default.option}"
            )
        return wanted
    raise UnsupportedModelError(
        f"--model-class {option}: {wanted} cannot hold a {family.name} model; use "
        f"--model-class auto ({default})"
    )


def _lacks(model_class: NanotronClass, spec: ModelSpec, target: str) -> str | None:
    """The first of what a model needs that a class does not hold."""
    has_drop_in = target == "nanotron-fast"
    return next(
        (need for need in needs(spec) if not model_class.can_hold(need, has_drop_in=has_drop_in)),
        None,
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
    quantization = config.get(QUANTIZATION)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        method = method or QUANTIZATION
        scheme = read_quantization(config)
        coded = {dtype for dtype in dtypes if dtype not in Dtype.__members__}
        if coded and (scheme is None or not coded <= scheme.dtypes):
            raise UnsupportedModelError(
                f"config.json: the weights are quantised ({method}, {', '.join(sorted(coded))}), "
                "which is not read: fp8 in e4m3 and mxfp4 are dequantised. Nanotron cannot train "
                "quantised weights; start from the unquantised model"
            )
        if coded:
            warnings.append(
                f"config.json: the quantised weights are dequantised from {scheme}. What is "
                f"written is in floating point, and {QUANTIZATION} is left out"
            )
        else:
            warnings.append(
                f"config.json: {QUANTIZATION} ({method}) is left out: every tensor is in floating "
                "point, so nothing is quantised"
            )
        del kept[QUANTIZATION]
    return kept, warnings


def check_model(
    family: Family,
    spec: ModelSpec,
    model_class: NanotronClass,
    *,
    target: str,
    version: str,
    rope_interleaved: bool | None,
) -> None:
    """Refuses a model that the chosen target cannot hold. Raises UnsupportedModelError.

    `rope_interleaved` is the layout to write; None for a checkpoint that has one already.
    """
    if target not in TARGETS:  # as a side file may say
        raise ConfigError(f"--target {target}: choose {' or '.join(TARGETS)}")
    need = _lacks(model_class, spec, target)
    if need is not None:
        raise _refused(need, spec, model_class, target)
    learned = LEARNED_ACTIVATIONS if "learned_activation" in family.expresses else frozenset()
    if spec.hidden_act not in NANOTRON_ACTIVATIONS | learned:
        raise UnsupportedModelError(
            f"hidden_act {spec.hidden_act!r} is not one of Nanotron's: "
            f"{' '.join(sorted(NANOTRON_ACTIVATIONS))}"
        )
    if rope_interleaved and not model_class.can_rotate_neighbours:
        raise UnsupportedModelError(rotates_halves(model_class))
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


def check_experts(model_class: NanotronClass, spec: ModelSpec, ep: int) -> None:
    """Refuses experts split over ranks that there are not, or that Nanotron cannot start with.

    Raises TopologyError, UnsupportedModelError.
    """
    if ep == 1:
        return
    if spec.moe is None:
        raise TopologyError(f"ep={ep}: the model has no experts to split over ranks")
    if model_class.is_stock:
        raise UnsupportedModelError(
            f"ep={ep}: Nanotron cannot start with experts split over ranks; --target nanotron-fast "
            "--model-class nanotron-fast writes them for this package"
        )


def check_kv_heads(
    params: Sequence[Param], model_class: NanotronClass, spec: ModelSpec, tp: int, *, way: str
) -> None:
    """Refuses ranks that outnumber the key-value heads of a class that has no copies of them.

    `way` says what to do instead. Raises TopologyError.
    """
    copies = spec.copies_of_kv_heads(tp)
    if copies == 1 or model_class.copies_kv_heads:
        return
    name, count = next(
        (param.name, part.sizes[part.cuts["tp"].dim])
        for param in params
        for part in param.parts
        if "tp" in part.cuts
        and part.cuts["tp"].unit == "kv heads"
        and part.sizes[part.cuts["tp"].dim] < tp
    )
    raise TopologyError(
        f"{name}: {count} kv heads do not split over tp={tp}, and Nanotron's {model_class} has no "
        f"copies of them; {way}"
    )


def rotates_halves(model_class: NanotronClass) -> str:
    """What to say to --rope-interleaved for a class that has no option for it."""
    return f"--rope-interleaved: {model_class.option.title()} rotates halves in Nanotron"


def _refused(
    need: str, spec: ModelSpec, model_class: NanotronClass, target: str
) -> UnsupportedModelError:
    """Why a class cannot hold a model, and the way out."""
    hint = ""
    if target != "nanotron-fast":
        hint = "; --target nanotron-fast admits it, and nanotron-fast train trains it"
    name, scaling = model_class.option.title(), spec.rope_scaling or {}
    windowed = sum(window is not None for window in spec.windows)
    reasons = {
        "rms_norm": f"its norms are RMSNorms, and {model_class} has LayerNorms",
        "layer_norm": f"its norms are LayerNorms, and {model_class} has RMSNorms",
        "gated_mlp": f"its MLP has a gate, and that of {model_class} has none",
        "plain_mlp": f"its MLP has no gate, and that of {model_class} has one",
        "rope_scaling": f"rope_scaling: {model_class} has no field for it"
        if target == "nanotron-fast"
        else f"rope_scaling {scaling.get('rope_type', scaling.get('type'))!r}: Nanotron stores "
        "rope_scaling and ignores it, so the model would run with wrong frequencies. Use --target "
        "nanotron-fast, and train with nanotron-fast train, or with Nanotron by nanotron-fast run "
        "--rope-scaling (the drop-in): both honour it",
        "head_dim": f"head_dim {spec.head_dim} is not hidden_size / heads = {spec.hidden_size} / "
        f"{spec.num_heads}, the only one that Nanotron has{hint}",
        "no_bias": f"use_bias is false: Nanotron's {name} always has biases{hint}",
        "untied": f"tie_word_embeddings is false: Nanotron's {name} always ties them{hint}",
        "output_bias": "attention_bias puts a bias on the attention's output projection, which "
        f"Nanotron does not have{hint}",
        "mlp_bias": f"mlp_bias: the MLP has biases, and Nanotron's has none{hint}",
        "qkv_bias": f"biases on q, k and v: Nanotron's {model_class} has none{hint}",
        "qk_norm": "its queries and keys are normalised (qk-norm), which Nanotron's "
        f"{model_class} does not do{hint}",
        "sliding_window": "a sliding window of "
        f"{next(filter(None, spec.windows), None)}: Nanotron's {model_class} has none{hint}",
        "some_windows": f"{windowed} of {spec.num_layers} layers have a sliding window. Nanotron "
        f"has one on all layers or on none{hint}",
        "no_rope_layers": "layers without rotary embedding: Nanotron's "
        f"{model_class} rotates in all of them{hint}",
        "some_no_rope_layers": "no_rope_layers leaves rotary embeddings out of layers "
        f"{list(spec.no_rope_layers)} of {spec.num_layers}. Nanotron leaves them out of every n-th "
        f"layer, where n divides the number of layers (no_rope_layer){hint}",
        "partial_rotary": f"rotary embeddings turn rows {spec.attention.rotary} of a head of "
        f"{spec.head_dim}: Nanotron rotates whole heads only{hint}",
        "windows_without_rope": f"a sliding window of {spec.sliding_window} together with layers "
        f"without rotary embedding: Nanotron drops the window on those layers{hint}",
        "moe": f"a mixture of experts: Nanotron's {model_class} has none{hint}",
        "unlike_layers": "its layers are of different sizes, and Nanotron's are all alike" + hint,
        **{
            name: f"{what}, which Nanotron's {model_class} does not do{hint}"
            for name, (_, what) in ODDITIES.items()
        },
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
    expressed = family.expresses
    if any(spec.windows) and "sliding_window" not in expressed:
        window = next(filter(None, spec.windows))
        raise refuse(f"Hugging Face's class has no sliding window (here {window})")
    if len({*spec.windows} - {None}) > 1:
        raise refuse("layers have windows of different sizes, and Hugging Face's class has one")
    if spec.no_rope_layers and "no_rope_layers" not in expressed:
        raise refuse("every layer has a rotary embedding in Hugging Face's class")
    if ("moe" in expressed) != (spec.moe is not None):
        raise refuse(
            "the checkpoint has experts"
            if spec.moe is not None
            else "the checkpoint has no experts"
        )
    for need in ("partial_rotary", "unlike_layers"):
        if need in needs(spec) and need not in expressed:
            raise refuse(f"Hugging Face's class has a place for nothing like it ({need})")
    if spec.qk_norm != family.qk_norm and "qk_norm" not in expressed:
        raise refuse(
            f"queries and keys are {'' if spec.qk_norm else 'not '}normalised in the "
            "checkpoint, and in Hugging Face's class it is the other way round"
        )
    has_shared = spec.moe is not None and spec.moe.has_shared_expert
    if "moe" in expressed and has_shared != ("shared_expert" in expressed):
        raise refuse(
            "Hugging Face's class has no shared expert, and the checkpoint has one"
            if has_shared
            else "Hugging Face's class has a shared expert, and the checkpoint has none"
        )
