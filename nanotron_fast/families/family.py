"""What a family is: a table of tensors, and where its `config.json` keeps what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanotron_fast.families.parts import Param
from nanotron_fast.families.rules import Context, Rule
from nanotron_fast.formats.nanotron.classes import NanotronClass
from nanotron_fast.model.spec import ModelSpec

# Where `config.json` keeps each field of ModelSpec that it keeps under a plain key.
COMMON_KEYS: Mapping[str, str] = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_act": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "use_cache": "use_cache",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of models, in both formats.

    A bias is true or false for the whole family, or the config key that says so. `window` says how
    the config speaks of sliding windows: "plain" (`sliding_window` is on every layer), "qwen" (only
    with `use_sliding_window`, on the layers from `max_window_layers` on), or None.
    """

    name: str
    architecture: str
    # The Nanotron class, and the one for models with a sliding window.
    model_class: NanotronClass
    window_class: NanotronClass | None = None
    # Classes that can hold it as well, for --model-class.
    other_classes: tuple[NanotronClass, ...] = ()
    rules: tuple[Rule, ...]
    # What transformers assumes of a key that config.json leaves out.
    defaults: Mapping[str, Any]
    # Differences from COMMON_KEYS.
    keys: Mapping[str, str] = field(default_factory=dict)
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    # Queries and keys are normalised: `when="qk_norm"` marks the rules of those norms.
    has_qk_norm: bool = False
    window: str | None = None
    has_no_rope_layers: bool = False
    is_moe: bool = False
    # --target nanotron-fast admits biases and a head_dim of its own.
    has_extended_target: bool = False
    # Keys that pass through unread: dropout rates, pretraining_tp.
    extras: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[NanotronClass, ...]:
        """The Nanotron classes that can hold a model of the family."""
        window = () if self.window_class is None else (self.window_class,)
        return (self.model_class, *window, *self.other_classes)

    @property
    def config_keys(self) -> dict[str, str]:
        """The config key of each plainly kept field of ModelSpec."""
        return {**COMMON_KEYS, **self.keys}

    def params(
        self,
        spec: ModelSpec,
        *,
        padded_vocab_size: int | None = None,
        rope_interleaved: bool = False,
        has_rope_pairs: bool = False,
    ) -> list[Param]:
        """Every parameter of a model, in the order of its layers.

        With `has_rope_pairs`, an interleaved model and one that is not have the same parts.
        """
        sizes = _sizes(spec, padded_vocab_size or spec.vocab_size)
        flags = _flags(spec)
        moe_layers = set(spec.moe.layers) if spec.moe else set()

        def context(layer: int | str) -> Context:
            is_paired = has_rope_pairs or rope_interleaved
            return Context(sizes, flags, rope_interleaved, is_paired, layer)

        before: list[Param] = []
        layers: list[list[Param]] = [[] for _ in range(spec.num_layers)]
        after: list[Param] = []
        for rule in self.rules:
            if rule.when is not None and rule.when not in flags:
                continue
            if rule.block != "layer":
                target = before if rule.block == "embedding" else after
                target.append(rule.expand(rule.param, context(rule.block)))
                continue
            for layer in range(spec.num_layers):
                if rule.layers != "all" and (rule.layers == "moe") != (layer in moe_layers):
                    continue
                layers[layer].append(rule.expand(rule.param.format(layer=layer), context(layer)))
        return before + [param for layer_params in layers for param in layer_params] + after


def _sizes(spec: ModelSpec, padded_vocab_size: int) -> dict[str, int]:
    moe = spec.moe
    return {
        "hidden": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate": spec.intermediate_size,
        "vocab": spec.vocab_size,
        "padded_vocab": padded_vocab_size,
        "experts": moe.num_experts if moe else 0,
        "moe_intermediate": moe.intermediate_size if moe else 0,
        "shared_intermediate": moe.shared_intermediate_size if moe else 0,
        "one": 1,
    }


def _flags(spec: ModelSpec) -> frozenset[str]:
    flags = {
        "qkv_bias": spec.has_qkv_bias,
        "output_bias": spec.has_output_bias,
        "mlp_bias": spec.has_mlp_bias,
        "untied": not spec.tie_word_embeddings,
        "tied": spec.tie_word_embeddings,
        "qk_norm": spec.has_qk_norm,
        "shared_expert": spec.moe is not None and spec.moe.has_shared_expert,
    }
    return frozenset(name for name, is_set in flags.items() if is_set)
