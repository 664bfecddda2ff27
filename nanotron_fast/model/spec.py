"""A model's architecture, in words that belong to neither format.

A family reads a `config.json` into a `ModelSpec` and back; a Nanotron model class reads a
`model_config.json` into one and back. Everything between the two formats goes through it.

A spec speaks layer by layer. Where all layers are alike, as in most models, its properties
(`num_heads`, `sliding_window`, ...) say what a layer has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nanotron_fast.errors import ConfigError
from nanotron_fast.model.spread import Heads

# Activations that Nanotron's ACT2FN knows (nanotron/nn/activations.py at 2411b022).
NANOTRON_ACTIVATIONS = frozenset(
    [
        "gelu",
        "gelu_10",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_pytorch_tanh",
        "gelu_accurate",
        "laplace",
        "linear",
        "mish",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "swish",
        "tanh",
    ]
)
# Those that have parameters of their own in each layer, in this package's models alone.
LEARNED_ACTIVATIONS = frozenset({"xielu"})


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: queries, keys and values are made of a few values a token.

    Args:
        q_rank: of the values that queries are made of; None: of the stream itself.
        kv_rank: of those that keys and values are made of.
        value_dim: rows of a value head; those of a query or key head are `head_dim`.
        rotates_neighbours: rotary pairs lie beside each other.
        norm_eps: of the norms of those values.
    """

    q_rank: int | None
    kv_rank: int
    value_dim: int
    rotates_neighbours: bool = True
    norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention. Heads are counted over all ranks.

    Args:
        head_dim: rows of the query, key and value projections for each head.
        rotary: the rows of a head that the rotary embedding turns, as (first, end); None where the
            layer has no rotary embedding.
        window: a query sees its last `window` keys, itself included; None: all of them.
        has_qkv_bias, has_output_bias: biases on q, k and v; on the output projection.
        qk_norm: queries and keys are normalised before the rotary embedding: "head", each head by
            itself; "whole", all heads' rows at once; "apart", each head by a LayerNorm that has
            weights of its own and no bias. The others are RMSNorms.
        scale: of the scores; None: head_dim ** -0.5.
        softcap: scores s become softcap * tanh(s / softcap).
        has_sinks: each head has a score of its own beside those of the keys, which takes weight
            from them and has no value.
        latent: how queries, keys and values are made, where it is not by a projection each. The
            last rows of a head turn then, and those of keys are the same for all heads.
        rope_theta: the base of this layer's frequencies, without the model's rope_scaling; None:
            the model's own, with it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: tuple[int, int] | None
    window: int | None = None
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    qk_norm: str | None = None
    scale: float | None = None
    softcap: float | None = None
    rope_theta: float | None = None
    has_sinks: bool = False
    latent: Latent | None = None

    def copies_of_kv_heads(self, tp: int) -> int:
        """How many of `tp` ranks have a copy of each key-value head: 1 where heads are split."""
        if self.latent is not None or self.num_heads % tp:
            return 1
        return Heads(self.num_kv_heads).copies(tp)


@dataclass(frozen=True, slots=True)
class Dense:
    """An MLP that every token goes through. Gated: act(gate(x)) * up(x), else act(up(x))."""

    intermediate_size: int
    has_bias: bool = False
    is_gated: bool = True


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts, and an expert that all tokens share where there is one.

    Args:
        has_shared_gate: what the shared expert gives is weighed by a sigmoid of each token's own.
        scoring: of the router's logits over all experts: "softmax", or "sigmoid" one by one.
        is_renormalised: the weights of the chosen experts are made to sum to 1.
        scale: of the weights, after that.
        has_correction_bias: a bias on the scores decides with them which experts are chosen, and
            not how much they count.
        has_bias: biases on the router's scores, and in the experts.
        clamped_glu: (alpha, limit) where an expert computes (up + 1) * gate * sigmoid(alpha * gate)
            with gate at most limit, and up within limit of 0, in place of the activation.
        num_groups, top_k_groups: experts are chosen from the best groups alone, a group being worth
            its two best experts.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int
    has_shared_expert: bool
    has_shared_gate: bool = True
    scoring: str = "softmax"
    is_renormalised: bool = False
    scale: float = 1.0
    has_correction_bias: bool = False
    num_groups: int = 1
    top_k_groups: int = 1
    has_bias: bool = False
    clamped_glu: tuple[float, float] | None = None


# Where a layer has its norms, and what kinds of norms there are.
NORM_PLACES = ("before", "after", "around", "parallel", "beside")
NORMS = ("rms_norm", "layer_norm", "plain_layer_norm")
QK_NORMS = ("head", "whole", "apart")
SCORINGS = ("softmax", "sigmoid")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a decoder: x = x + attention(x), x = x + mlp(x), and norms in one of
    NORM_PLACES.

    "before" each of the two, "after" each of them, "around": both; "parallel": the two work side by
    side on one norm of x; or "beside": side by side, each on a norm of x of its own.
    """

    attention: Attention
    mlp: Dense | Experts
    norms: str = "before"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The architecture of a decoder. Sizes in elements; None where a model has no such thing.

    Args:
        intermediate_size: that of the dense layers; configurations have one where there are none.
        norm: of the residual stream: "rms_norm", "layer_norm" (which has biases) or
            "plain_layer_norm" (which has none).
        norm_adds_one: an RMSNorm's weights are stored less one.
        embedding_scale: of what comes out of the embedding, rounded to its dtype.
        residual_scale: of what attention and MLP add to the stream.
        logit_scale, logit_softcap: of the logits, the scale first.
        bos_token_id, eos_token_id, pad_token_id: as in config.json: an id, a list, or nothing.
        extras: kept by both formats, used by neither: `pretraining_tp`, dropout rates.
    """

    hidden_size: int
    layers: tuple[Layer, ...]
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    hidden_act: str
    norm_eps: float
    initializer_range: float
    rope_theta: float
    tie_word_embeddings: bool
    norm: str = "rms_norm"
    norm_adds_one: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    rope_scaling: Mapping[str, Any] | None = None
    router_aux_loss_coef: float | None = None
    bos_token_id: Any = None
    eos_token_id: Any = None
    pad_token_id: Any = None
    use_cache: bool = True
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention(self) -> Attention:
        """That of the first layer, which stands for all where `are_alike`."""
        return self.layers[0].attention

    @property
    def num_heads(self) -> int:
        return self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim

    @property
    def has_qkv_bias(self) -> bool:
        return self.attention.has_qkv_bias

    @property
    def has_output_bias(self) -> bool:
        return self.attention.has_output_bias

    @property
    def qk_norm(self) -> str | None:
        return self.attention.qk_norm

    @property
    def norm_places(self) -> tuple[str, ...]:
        """Where layers have their norms: each place once, in the order of the layers."""
        return tuple(dict.fromkeys(each.norms for each in self.layers))

    @property
    def has_mlp_bias(self) -> bool:
        """Whether a dense layer has biases in its MLP."""
        return any(isinstance(each.mlp, Dense) and each.mlp.has_bias for each in self.layers)

    @property
    def has_gated_mlp(self) -> bool:
        """Whether every dense layer's MLP is gated."""
        return all(not isinstance(each.mlp, Dense) or each.mlp.is_gated for each in self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        return tuple(each.attention.window for each in self.layers)

    @property
    def sliding_window(self) -> int | None:
        """The window that every layer has; None where some layer has none, or another."""
        return self.windows[0] if len(set(self.windows)) == 1 else None

    @property
    def rope_kind(self) -> str:
        """How the angles are scaled, as in transformers: "default", "linear", "yarn", ..."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type") or scaling.get("type") or "default")

    @property
    def max_positions(self) -> int | None:
        """How long a sequence the angles are made for.

        None where they follow its length, as with "dynamic" scaling, and where no layer turns
        anything. Raises ConfigError where rope_scaling has no numbers.
        """
        stated = self.max_position_embeddings
        if self.rope_kind == "dynamic" or len(self.no_rope_layers) == self.num_layers:
            return None
        if self.rope_kind not in ("linear", "yarn"):
            return stated
        # Stated is the length before they are stretched (Qwen3) or after (DeepSeek-V3).
        original = self._scaling_number("original_max_position_embeddings") or stated
        return max(stated, int(original * (self._scaling_number("factor") or 1)))

    def _scaling_number(self, key: str) -> float | None:
        value = (self.rope_scaling or {}).get(key)
        if value is None or (isinstance(value, int | float) and abs(value) < 2**31):
            return value
        raise ConfigError(f"rope_scaling.{key} is {value!r}, and should be a number below 2**31")

    @property
    def keys_of_max_positions(self) -> str:
        """Of a configuration, those that `max_positions` comes from, in words."""
        is_stretched = (self.max_positions or 0) > self.max_position_embeddings
        return "max_position_embeddings" + (" and rope_scaling" if is_stretched else "")

    @property
    def no_rope_layers(self) -> tuple[int, ...]:
        """The layers without rotary embedding."""
        return tuple(i for i, each in enumerate(self.layers) if each.attention.rotary is None)

    @property
    def no_rope_interval(self) -> int | None:
        """n where every n-th layer has no rotary embedding, and n divides the number of layers.

        None where all layers have one, or where those without lie in another order.
        """
        without = self.no_rope_layers
        interval = without[0] + 1 if without else 0
        is_regular = without and without == tuple(range(interval - 1, self.num_layers, interval))
        return interval if is_regular and self.num_layers % interval == 0 else None

    @property
    def moe(self) -> Experts | None:
        """The experts of the first layer that has some."""
        return next((each.mlp for each in self.layers if isinstance(each.mlp, Experts)), None)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with experts."""
        return tuple(i for i, each in enumerate(self.layers) if isinstance(each.mlp, Experts))

    def copies_of_kv_heads(self, tp: int) -> int:
        """As of Attention, in the layer that has most."""
        return max(each.attention.copies_of_kv_heads(tp) for each in self.layers)

    @property
    def are_alike(self) -> bool:
        """Whether layers differ in windows, rotary embedding and experts alone, of one size."""
        free: dict[str, Any] = {"window": None, "rotary": None, "rope_theta": None}
        first = replace(self.attention, **free)
        attentions = (replace(each.attention, **free) for each in self.layers)
        rotaries = {each.attention.rotary for each in self.layers} - {None}
        mlps = {each.mlp for each in self.layers}
        kinds = {type(mlp) for mlp in mlps}
        return (
            all(each == first for each in attentions)
            and len(rotaries) <= 1
            and len(mlps) == len(kinds)
        )

    def with_attention(self, **changes: Any) -> ModelSpec:
        """The same with other attributes of Attention on every layer."""
        layers = (
            replace(each, attention=replace(each.attention, **changes)) for each in self.layers
        )
        return replace(self, layers=tuple(layers))


def differing_layer(left: ModelSpec, right: ModelSpec) -> tuple[str, object, object] | None:
    """Where two specs of equal length first differ in a layer: what of it, and both values."""
    for number, (one, other) in enumerate(zip(left.layers, right.layers, strict=True)):
        for part in ("attention", "mlp"):
            a, b = getattr(one, part), getattr(other, part)
            if type(a) is not type(b):
                return f"the {part} of layer {number}", type(a).__name__, type(b).__name__
            for each in fields(a):
                values = getattr(a, each.name), getattr(b, each.name)
                if values[0] != values[1]:
                    return f"{each.name} of layer {number}", *values
        if one.norms != other.norms:
            return f"norms of layer {number}", one.norms, other.norms
    return None


# What can be compared of two specs by name, what decides about tensors first.
STRUCTURE = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
    "has_qkv_bias",
    "has_output_bias",
    "has_mlp_bias",
    "qk_norm",
    "has_gated_mlp",
    "norm",
    "moe",
    "moe_layers",
)
COMPUTED = (
    *STRUCTURE,
    "hidden_act",
    "norm_eps",
    "norm_adds_one",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "logit_softcap",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
    "no_rope_interval",
    "layers",
)
