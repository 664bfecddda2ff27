"""What a family is: a table of tensors, and where its `config.json` keeps what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanotron_fast.families.parts import Param
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.families.rules import Context, Rule
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.nanotron.classes import NanotronClass
from nanotron_fast.formats.rope import read_rope
from nanotron_fast.model.spec import (
    LEARNED_ACTIVATIONS,
    Attention,
    Dense,
    Experts,
    Layer,
    ModelSpec,
)

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

    A bias is true or false for the whole family, or the config key that says so.

    Args:
        name, architecture: model_type and the class, in config.json.
        model_class: the Nanotron class for its models, and `window_class` for those with windows.
        other_classes: those that can hold it as well, for --model-class.
        rules: the table of tensors.
        defaults: what transformers assumes of a key that config.json leaves out.
        keys: differences from COMMON_KEYS.
        renamed: names under which newer versions of transformers write a key, and its own name.
        norm, norm_adds_one, has_gated_mlp, norms, qk_norm: as in ModelSpec, of every layer, unless
            a quirk says otherwise.
        rotates_neighbours: the published model has rotary pairs beside each other in q and k; in
            Nanotron's parameters they lie half a head apart.
        rope: reads the base and the scaling of rotary embeddings.
        quirks: what else config.json says, in the order in which it is read.
        recognises: whether a model_config.json of one of its classes is one of this family, where
            nothing else says so.
        writes_head_dim: its class keeps head_dim whatever it is.
        neutral: keys that its class computes with and nothing here does: only values that change
            nothing are taken.
        buffers: patterns of tensors that old files keep among the weights, and that are none.
        extras: keys that pass through unread: dropout rates, pretraining_tp.
        prediction_layers: the key that counts layers which follow a model's own and predict later
            tokens (MTP), where the published models have some.
    """

    name: str
    architecture: str
    model_class: NanotronClass
    window_class: NanotronClass | None = None
    other_classes: tuple[NanotronClass, ...] = ()
    rules: tuple[Rule, ...]
    defaults: Mapping[str, Any]
    keys: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    norm: str = "rms_norm"
    has_gated_mlp: bool = True
    norm_adds_one: bool = False
    norms: str = "before"
    qk_norm: str | None = None
    rotates_neighbours: bool = False
    rope: Callable[[Fields], tuple[float, Mapping[str, Any] | None]] = read_rope
    quirks: tuple[Quirk, ...] = ()
    recognises: Callable[[Mapping[str, Any]], bool] = lambda model_config: False
    writes_head_dim: bool = False
    neutral: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    prediction_layers: str | None = None

    @property
    def expresses(self) -> frozenset[str]:
        """What of `model.needs` its config.json can say, and "shared_expert"."""
        return frozenset[str]().union(*(quirk.expresses for quirk in self.quirks))

    @property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Other names under which a config may say a key's value once more."""
        return {key: names for quirk in self.quirks for key, names in quirk.aliases.items()}

    @property
    def classes(self) -> tuple[NanotronClass, ...]:
        """The Nanotron classes that can hold a model of the family."""
        window = () if self.window_class is None else (self.window_class,)
        return (self.model_class, *window, *self.other_classes)

    @property
    def config_keys(self) -> dict[str, str]:
        """The config key of each plainly kept field of ModelSpec."""
        return {**COMMON_KEYS, **self.keys}

    def num_predicting(self, config: Mapping[str, Any]) -> int:
        """How many layers a config says follow a model's own, which nothing here computes."""
        number = None if self.prediction_layers is None else config.get(self.prediction_layers)
        return number if isinstance(number, int) else 0

    def params(
        self,
        spec: ModelSpec,
        *,
        padded_vocab_size: int | None = None,
        rope_interleaved: bool = False,
        has_rope_pairs: bool = False,
        tensors_interleaved: bool = False,
        copies_kv_heads: bool = False,
    ) -> list[Param]:
        """Every parameter of a model, in the order of its layers.

        With `has_rope_pairs`, an interleaved model and one that is not have the same parts.
        `tensors_interleaved`: the published model has rotary pairs beside each other as well.
        `copies_kv_heads`: where there are fewer key-value heads than tensor-parallel ranks, several
        ranks have a copy of each; without it such ranks are refused.
        """
        padded_vocab = padded_vocab_size or spec.vocab_size
        tensors_interleaved = tensors_interleaved or self.rotates_neighbours
        is_paired = has_rope_pairs or rope_interleaved or tensors_interleaved
        outer = spec.layers[0]

        def context(layer: int | str, of: Layer) -> Context:
            sizes, flags = _sizes(spec, of, padded_vocab), _flags(spec, of)
            return Context(
                sizes,
                flags,
                rope_interleaved,
                is_paired,
                layer,
                tensors_interleaved,
                copies_kv_heads,
            )

        before: list[Param] = []
        after: list[Param] = []
        for rule in self.rules:
            around = context(rule.block, outer)
            if rule.block != "layer" and (rule.when is None or rule.when in around.flags):
                params = before if rule.block == "embedding" else after
                params.append(rule.expand(rule.param, around))
        layers: list[Param] = []
        for number, layer in enumerate(spec.layers):
            within = context(number, layer)
            kind = "moe" if isinstance(layer.mlp, Experts) else "dense"
            layers += [
                rule.expand(rule.param.format(layer=number), within)
                for rule in self.rules
                if rule.block == "layer"
                and rule.layers in ("all", kind)
                and (rule.when is None or rule.when in within.flags)
            ]
        return before + layers + after


def _sizes(spec: ModelSpec, layer: Layer, padded_vocab_size: int) -> dict[str, int]:
    attention = layer.attention
    experts = layer.mlp if isinstance(layer.mlp, Experts) else None
    dense = layer.mlp if isinstance(layer.mlp, Dense) else None
    # A layer that does not rotate has its rows in the order of the others.
    rotary_first, rotary_end = attention.rotary or (0, attention.head_dim)
    return {
        "hidden": spec.hidden_size,
        "heads": attention.num_heads,
        "kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rotary_first": rotary_first,
        "rotary_end": rotary_end,
        **_latent_sizes(attention),
        "intermediate": dense.intermediate_size if dense else spec.intermediate_size,
        "vocab": spec.vocab_size,
        "padded_vocab": padded_vocab_size,
        "experts": experts.num_experts if experts else 0,
        "moe_intermediate": experts.intermediate_size if experts else 0,
        "shared_intermediate": experts.shared_intermediate_size if experts else 0,
        "one": 1,
    }


def _latent_sizes(attention: Attention) -> dict[str, int]:
    latent, rotary = attention.latent, attention.rotary
    if latent is None or rotary is None:
        return {}
    return {
        "q_rank": latent.q_rank or 0,
        "kv_rank": latent.kv_rank,
        "kv_rank_and_rotary": latent.kv_rank + rotary[1] - rotary[0],
        "key_and_value": rotary[0] + latent.value_dim,
        "value_dim": latent.value_dim,
    }


def _flags(spec: ModelSpec, layer: Layer) -> frozenset[str]:
    attention, mlp = layer.attention, layer.mlp
    flags = {
        "learned_activation": spec.hidden_act in LEARNED_ACTIVATIONS,
        "qkv_bias": attention.has_qkv_bias,
        "output_bias": attention.has_output_bias,
        "mlp_bias": isinstance(mlp, Dense) and mlp.has_bias,
        "untied": not spec.tie_word_embeddings,
        "tied": spec.tie_word_embeddings,
        "qk_norm": attention.qk_norm is not None,
        "mlp_norm": layer.norms != "parallel",
        "sinks": attention.has_sinks,
        "expert_bias": isinstance(mlp, Experts) and mlp.has_bias,
        "q_rank": attention.latent is not None and attention.latent.q_rank is not None,
        "no_q_rank": attention.latent is not None and attention.latent.q_rank is None,
        "q_rank_bias": attention.latent is not None
        and attention.latent.q_rank is not None
        and attention.has_qkv_bias,
        "shared_expert": isinstance(mlp, Experts) and mlp.has_shared_expert,
        "shared_gate": isinstance(mlp, Experts) and mlp.has_shared_expert and mlp.has_shared_gate,
        "correction_bias": isinstance(mlp, Experts) and mlp.has_correction_bias,
    }
    return frozenset(name for name, is_set in flags.items() if is_set)
