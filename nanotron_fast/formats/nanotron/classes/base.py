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
from nanotron_fast.model.spec import ModelSpec

FILE = "model_config.json"

# What no class of Nanotron's has, and --target nanotron-fast writes after its fields where a model
# differs from what they can say. Stock Nanotron stops at them, as it should: it would compute
# something else.
EXTENSION_FIELDS = ("head_dim", "attention_output_bias", "mlp_bias")

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NanotronClass:
    """One class: its fields, what a model of it computes, and its ways in every version.

    What a model needs (`model.needs`) and the class does not hold is refused: `families.gate`.

    Args:
        name: of the class in Nanotron, such as LlamaConfig.
        option: its name for --model-class.
        marker: the field that says which class a model_config.json is of.
        fields: every field in its order, with its default.
        fields_1_2: those of checkpoint version 1.2 (PyPI's 0.4); None where it lacks the class.
        keys: where a field of ModelSpec has another name.
        holds: what a model of the class can have of `model.needs`.
        extension: what --target nanotron-fast adds to that.
        write_rest, read_rest: of what is not kept under a plain field, between a ModelSpec and the
            class; the latter gets the fields that were read so far.
        mlp_matrices: by which Nanotron counts what a layer costs.
        casts_to_fp32: the model ends with a pipeline block that casts logits.
        ignores_attention_bias: it has the field, and stock models of it no bias whatever it says.
        rotates_neighbours_in_1_2: before September 2024 there was no other way, and no field.
        can_rotate_neighbours: it has rope_interleaved.
        starts_from_yaml: Nanotron can train it from a config.yaml.
        pp_warning: what goes wrong at pp > 1, for each version where something does.
    """

    name: str
    option: str
    marker: str
    fields: Mapping[str, Any]
    fields_1_2: tuple[str, ...] | None
    keys: Mapping[str, str]
    holds: frozenset[str]
    extension: frozenset[str] = frozenset()
    write_rest: Callable[[dict[str, Any], ModelSpec, bool], None]
    read_rest: Callable[[Fields, dict[str, Any], Mapping[str, Any]], ModelSpec]
    mlp_matrices: int = 3
    casts_to_fp32: bool = False
    ignores_attention_bias: bool = False
    rotates_neighbours_in_1_2: bool = False
    can_rotate_neighbours: bool = True
    starts_from_yaml: bool = True
    pp_warning: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def key(self, name: str) -> str:
        """Where the class keeps a field of ModelSpec."""
        return self.keys.get(name, name)

    def can_hold(self, need: str, *, is_extended: bool) -> bool:
        """Whether a model of the class can have something of `model.needs`."""
        return need in self.holds or (is_extended and need in self.extension)

    def first_token(self, value: Any, name: str) -> int | None:
        """The one id that Nanotron keeps: the first of a list; for null, the class's default."""
        if isinstance(value, list):
            value = value[0] if value else None
        return self.fields.get(name) if value is None else value

    def write(self, spec: ModelSpec, *, version: str, rope_interleaved: bool) -> dict[str, Any]:
        """Every field of the class, in its order, and the extension's where it is needed.

        Raises UnsupportedModelError where the version lacks the class.
        """
        config = dict(self.fields)
        for name in _PLAIN:
            config[self.key(name)] = getattr(spec, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if name in config:
                config[name] = self.first_token(getattr(spec, name), name)
        self.write_rest(config, spec, rope_interleaved)
        if version == "1.2":
            if self.fields_1_2 is None:
                raise UnsupportedModelError(
                    f"checkpoint version 1.2 (Nanotron 0.4) has no {self}: only LlamaConfig and "
                    "Starcoder2Config"
                )
            config = {name: config[name] for name in self.fields_1_2}
        if self.extension & {"head_dim"} and _is_extended(spec):
            values = (spec.head_dim, spec.has_output_bias, spec.has_mlp_bias)
            config.update(zip(EXTENSION_FIELDS, values, strict=True))
        return config

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
        full = Fields(FILE, config, self.fields)
        head_dim = full.positive_or_none("head_dim") or head_dim
        fields: dict[str, Any] = {}
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "vocab_size",
            "max_position_embeddings",
        ):
            limit = MAX_COUNT if name == "num_layers" else MAX_SIZE
            fields[name] = full.positive(self.key(name), limit)
        for name in ("initializer_range", "norm_eps"):
            fields[name] = full.number(self.key(name))
        fields["rope_theta"], fields["rope_scaling"] = read_rope(full)
        fields["hidden_act"] = full.text(self.key("hidden_act"))
        num_kv_heads = full.positive_or_none(self.key("num_kv_heads"))
        if num_kv_heads is None:
            num_kv_heads = 1 if full.get("multi_query") else fields["num_heads"]
        if fields["num_heads"] % num_kv_heads:
            raise full.error(
                self.key("num_kv_heads"), f"a divisor of the {fields['num_heads']} heads"
            )
        if head_dim is None and fields["hidden_size"] < fields["num_heads"]:
            raise full.error("hidden_size", f"at least the {fields['num_heads']} heads")
        fields["num_kv_heads"] = num_kv_heads
        intermediate_size = full.positive_or_none("intermediate_size")
        fields["intermediate_size"] = intermediate_size or 4 * fields["hidden_size"]
        fields["head_dim"] = head_dim or fields["hidden_size"] // fields["num_heads"]
        for name in ("bos_token_id", "eos_token_id"):
            fields[name] = full.token_ids(name)
        return self.read_rest(full, fields, moe_sizes or {})

    def rope_is_interleaved(self, config: Mapping[str, Any]) -> bool:
        """Whether rotary pairs lie beside each other. Raises ConfigError.

        Nanotron's Llama rotated neighbours, and had no option for it, until September 2024:
        version 1.2 (without rope_theta) and the months of 1.4 that had rope_theta and no
        rope_interleaved.
        """
        defaults = {"rope_interleaved": self.rotates_neighbours_in_1_2}
        return Fields(FILE, config, defaults).flag("rope_interleaved")


def _is_extended(spec: ModelSpec) -> bool:
    """Whether a LlamaConfig's own fields leave something about a model out."""
    return (
        spec.head_dim * spec.num_heads != spec.hidden_size
        or spec.has_qkv_bias
        or spec.has_output_bias
        or spec.has_mlp_bias
    )


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
