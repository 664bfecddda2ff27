"""What one of Nanotron's model configuration classes is, and what all of them have in common.

Source of the fields: nanotron/config/models_config.py at 2411b022 (checkpoint version 1.5); PyPI's
0.4 (version 1.2) has a subset. A stock class fails on a key it does not know, so exactly these are
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.formats.fields import MAX_COUNT, MAX_SIZE, Fields
from nanotron_fast.formats.rope import read_rope
from nanotron_fast.model.spec import Attention, Layer, ModelSpec

FILE = "model_config.json"
# Main has no such field, and some of Nanotron's branches do.
HEAD_DIM = "head_dim"

# Both take what is not kept under a plain field: the latter gets what was read so far, "attention"
# and "num_layers" among it.
WriteRest = Callable[[dict[str, Any], ModelSpec, bool], None]
ReadRest = Callable[[Fields, dict[str, Any], Mapping[str, Any]], ModelSpec]

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


LayerCost = Callable[[ModelSpec, Layer], int]


def layer_cost(*, mlp_matrices: int) -> LayerCost:
    """What a layer costs by Nanotron's own count, for a class whose MLP has so many matrices.

    Source: get_block_compute_costs of llama.py, qwen.py and starcoder2.py at 2411b022: attention's
    projections as if every head had keys and values, and the dense MLP also where there are
    experts.
    """

    def cost(spec: ModelSpec, layer: Layer) -> int:
        heads = spec.num_heads * (spec.hidden_size // spec.num_heads)
        return (4 * heads + mlp_matrices * spec.intermediate_size) * spec.hidden_size

    return cost


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NanotronClass:
    """One class: its fields, what a model of it computes, and its ways in every version.

    What a model needs (`model.needs`) and the class does not hold is refused: `families.refusals`.

    Args:
        name: of the class in Nanotron, such as LlamaConfig.
        option: its name for --model-class.
        marker: the field that says which class a model_config.json is of.
        fields: every field in its order, with its default.
        fields_1_2: those of checkpoint version 1.2 (PyPI's 0.4); None where it lacks the class.
        holds: what a model of the class can have of `model.needs`.
        drop_in_holds: what the drop-in adds to that, for --target nanotron-fast.
        layer_cost: what a layer counts when Nanotron assigns layers to pipeline stages.
        casts_to_fp32: the model ends with a pipeline block that casts logits.
        has_norms_first: both norms of a layer come before its attention among the parameters, by
            whose order the file of an optimizer numbers its states.
        ignores_attention_bias: it has the field, and stock models of it no bias whatever it says.
        rotates_neighbours_in_1_2: before September 2024 there was no other way, and no field.
        can_rotate_neighbours: it has rope_interleaved.
        is_stock: it is Nanotron's, and not this package's own. One that is not says of which family
            its model is, gives layers without rotary embedding their windows, and has copies of
            key-value heads on tensor-parallel ranks that outnumber them.
        starts_from_yaml: Nanotron can train it from a config.yaml.
        pp_warning: what goes wrong at pp > 1, for each version where something does.
    """

    name: str
    option: str
    marker: str
    fields: Mapping[str, Any]
    fields_1_2: tuple[str, ...] | None
    holds: frozenset[str]
    drop_in_holds: frozenset[str] = frozenset()
    layer_cost: LayerCost
    casts_to_fp32: bool = False
    has_norms_first: bool = False
    ignores_attention_bias: bool = False
    rotates_neighbours_in_1_2: bool = False
    can_rotate_neighbours: bool = True
    is_stock: bool = True
    starts_from_yaml: bool = True
    pp_warning: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def copies_kv_heads(self) -> bool:
        """Whether several tensor-parallel ranks may have a copy of a key-value head."""
        return not self.is_stock

    def can_hold(self, need: str, *, has_drop_in: bool = False) -> bool:
        """Whether a model of the class can have something of `model.needs`."""
        return need in self.holds or (has_drop_in and need in self.drop_in_holds)

    def check_version(self, version: str) -> None:
        """Raises UnsupportedModelError where Nanotron lacked the class then."""
        if version == "1.2" and self.fields_1_2 is None:
            raise UnsupportedModelError(
                f"checkpoint version 1.2 (Nanotron 0.4) has no {self}: only LlamaConfig and "
                "Starcoder2Config"
            )

    def write(
        self, spec: ModelSpec, *, family: str, version: str, rope_interleaved: bool
    ) -> dict[str, Any]:
        """Every field of the class, in its order. `family` is the name of the model's.

        Raises UnsupportedModelError where the version lacks the class.
        """
        raise NotImplementedError

    def read(
        self,
        config: Mapping[str, Any],
        *,
        head_dim: int | None = None,
        moe_sizes: Mapping[str, Any] | None = None,
    ) -> ModelSpec:
        """The architecture of a model_config.json; absent fields have the class's defaults.

        `head_dim` and `moe_sizes`, which tensors show, stand in for fields that the config lacks.
        Raises ConfigError, UnsupportedModelError.
        """
        raise NotImplementedError

    def rope_is_interleaved(self, config: Mapping[str, Any]) -> bool:
        """Whether rotary pairs lie beside each other. Raises ConfigError.

        Nanotron's Llama rotated neighbours, and had no option for it, until September 2024:
        version 1.2 (without rope_theta) and the months of 1.4 that had rope_theta and no
        rope_interleaved.
        """
        defaults = {"rope_interleaved": self.rotates_neighbours_in_1_2}
        return Fields(FILE, config, defaults).flag("rope_interleaved")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StockClass(NanotronClass):
    """A class of Nanotron's own, which keeps most of a ModelSpec under plain fields.

    Args:
        keys: where a field of ModelSpec has another name.
        write_rest, read_rest: of what is not kept under a plain field, between a ModelSpec and the
            class; the latter gets the fields that were read so far.
    """

    keys: Mapping[str, str]
    write_rest: WriteRest
    read_rest: ReadRest

    def key(self, name: str) -> str:
        """Where the class keeps a field of ModelSpec."""
        return self.keys.get(name, name)

    def first_token(self, value: Any, name: str) -> int | None:
        """The one id that Nanotron keeps: the first of a list; for null, the class's default."""
        if isinstance(value, list):
            value = value[0] if value else None
        return self.fields.get(name) if value is None else value

    def write(
        self, spec: ModelSpec, *, family: str, version: str, rope_interleaved: bool
    ) -> dict[str, Any]:
        """See NanotronClass."""
        config = dict(self.fields)
        for name in _PLAIN:
            config[self.key(name)] = getattr(spec, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if name in config:
                config[name] = self.first_token(getattr(spec, name), name)
        self.write_rest(config, spec, rope_interleaved)
        self.check_version(version)
        if version == "1.2" and self.fields_1_2 is not None:
            config = {name: config[name] for name in self.fields_1_2}
        return config

    def read(
        self,
        config: Mapping[str, Any],
        *,
        head_dim: int | None = None,
        moe_sizes: Mapping[str, Any] | None = None,
    ) -> ModelSpec:
        """See NanotronClass. `head_dim` is read where a branch of Nanotron's wrote it."""
        full = Fields(FILE, config, self.fields)
        head_dim = full.positive_or_none(HEAD_DIM) or head_dim
        fields: dict[str, Any] = {}
        for name in ("hidden_size", "vocab_size", "max_position_embeddings"):
            fields[name] = full.positive(self.key(name), MAX_SIZE)
        fields["num_layers"] = full.positive(self.key("num_layers"), MAX_COUNT)
        num_heads = full.positive(self.key("num_heads"), MAX_SIZE)
        for name in ("initializer_range", "norm_eps"):
            fields[name] = full.number(self.key(name))
        fields["rope_theta"], fields["rope_scaling"] = read_rope(full)
        fields["hidden_act"] = full.text(self.key("hidden_act"))
        num_kv_heads = full.positive_or_none(self.key("num_kv_heads"))
        if num_kv_heads is None:
            num_kv_heads = 1 if full.get("multi_query") else num_heads
        if num_heads % num_kv_heads:
            raise full.error(self.key("num_kv_heads"), f"a divisor of the {num_heads} heads")
        if head_dim is None and fields["hidden_size"] < num_heads:
            raise full.error("hidden_size", f"at least the {num_heads} heads")
        head_dim = head_dim or fields["hidden_size"] // num_heads
        fields["attention"] = Attention(num_heads, num_kv_heads, head_dim, (0, head_dim))
        intermediate_size = full.positive_or_none("intermediate_size")
        fields["intermediate_size"] = intermediate_size or 4 * fields["hidden_size"]
        for name in ("bos_token_id", "eos_token_id"):
            fields[name] = full.token_ids(name)
        return self.read_rest(full, fields, moe_sizes or {})


_CLASSES: dict[str, NanotronClass] = {}


def register(new: NanotronClass) -> NanotronClass:
    """Adds a class to those that every function of this package knows. Raises ValueError."""
    if _CLASSES.setdefault(new.name, new) is not new:
        raise ValueError(f"a class named {new.name!r} is there already")
    return new


def classes() -> tuple[NanotronClass, ...]:
    """Every class, in the order of registration."""
    return tuple(_CLASSES.values())


def class_of(config: Mapping[str, Any]) -> NanotronClass:
    """The class that a model_config.json was written from. Raises ConfigError."""
    for each in _CLASSES.values():
        if config.get(each.marker):
            return each
    markers = ", ".join(each.marker for each in _CLASSES.values())
    raise ConfigError(f"{FILE}: none of {markers} says which of Nanotron's classes it is")
