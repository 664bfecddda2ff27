"""This package's own class, for models that none of Nanotron's can hold.

Its `model_config.json` says everything that ModelSpec can say, layer by layer: equal layers in a
row are written once, with their `count`. Stock Nanotron stops at it, as it should: it would compute
something else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from itertools import groupby
from typing import Any

from nanotron_fast.errors import ConfigError
from nanotron_fast.formats.fields import MAX_COUNT, Fields, is_number
from nanotron_fast.formats.nanotron.classes.base import FILE, NanotronClass, register
from nanotron_fast.formats.rope import read_rope
from nanotron_fast.model.needs import ALL_NEEDS
from nanotron_fast.model.spec import (
    NORM_PLACES,
    NORMS,
    QK_NORMS,
    SCORINGS,
    Attention,
    Dense,
    Experts,
    Latent,
    Layer,
    ModelSpec,
)

_FIELDS: dict[str, Any] = {
    "is_nanotron_fast_config": True,
    "family": None,
    "hidden_size": None,
    "intermediate_size": None,
    "vocab_size": None,
    "max_position_embeddings": None,
    "hidden_act": None,
    "norm": "rms_norm",
    "norm_adds_one": False,
    "norm_eps": None,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "logit_softcap": None,
    "initializer_range": None,
    "rope_theta": None,
    "rope_scaling": None,
    "tie_word_embeddings": None,
    "router_aux_loss_coef": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "use_cache": True,
    "extras": {},
    "layers": None,
}
_KINDS: Mapping[str, type[Dense | Experts]] = {"dense": Dense, "experts": Experts}


class _OwnClass(NanotronClass):
    __slots__ = ()

    def write(
        self, spec: ModelSpec, *, family: str, version: str, rope_interleaved: bool
    ) -> dict[str, Any]:
        """See NanotronClass."""
        self.check_version(version)
        config = {
            name: getattr(spec, name)
            for name in self.fields
            if name not in (self.marker, "family", "layers")
        }
        config["rope_scaling"] = None if spec.rope_scaling is None else dict(spec.rope_scaling)
        config["extras"] = dict(spec.extras)
        layers = [
            {"count": len([*equal]), **_written(layer)} for layer, equal in groupby(spec.layers)
        ]
        return {self.marker: True, "family": family, **config, "layers": layers}

    def read(
        self,
        config: Mapping[str, Any],
        *,
        head_dim: int | None = None,
        moe_sizes: Mapping[str, Any] | None = None,
    ) -> ModelSpec:
        """See NanotronClass. Nothing is left for tensors to show."""
        full = Fields(FILE, config, self.fields)
        sizes = ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")
        fields: dict[str, Any] = {name: full.positive(name) for name in sizes}
        scales = ("embedding_scale", "residual_scale", "logit_scale")
        for name in ("norm_eps", "initializer_range", *scales):
            fields[name] = full.number(name)
        fields["rope_theta"], fields["rope_scaling"] = read_rope(full)
        for name in ("router_aux_loss_coef", "logit_softcap"):
            fields[name] = _number_or_none(full, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields[name] = full.token_ids(name)
        for name in ("tie_word_embeddings", "use_cache", "norm_adds_one"):
            fields[name] = full.flag(name)
        fields["hidden_act"], fields["norm"] = full.text("hidden_act"), _one_of(full, "norm", NORMS)
        return ModelSpec(
            **fields, layers=tuple(_read_layers(full)), extras=full.mapping("extras") or {}
        )


def _written(layer: Layer) -> dict[str, Any]:
    kind = next(name for name, each in _KINDS.items() if isinstance(layer.mlp, each))
    attention = _lists(asdict(layer.attention))
    return {
        "attention": attention,
        "mlp": {"kind": kind, **_lists(asdict(layer.mlp))},
        "norms": layer.norms,
    }


def _lists(document: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in document.items()
    }


def _one_of(fields: Fields, name: str, choices: Collection[str]) -> str:
    found = fields.text(name)
    if found not in choices:
        raise fields.error(name, " or ".join(choices))
    return found


def _number_or_none(fields: Fields, name: str) -> float | None:
    return None if fields.get(name) is None else fields.number(name)


def _read_layers(full: Fields) -> Iterator[Layer]:
    runs = full.get("layers")
    if not isinstance(runs, list) or not runs:
        raise full.error("layers", "a list of layers")
    total = 0
    for place, run in enumerate(runs):
        where = f"{FILE}: layers[{place}]"
        if not isinstance(run, Mapping):
            raise ConfigError(f"{where} is {run!r}, and should be an object")
        _check_keys(where, run, ("count", *_names(Layer)), ())
        fields = Fields(where, run)
        count = fields.positive("count", MAX_COUNT)
        total += count
        if total > MAX_COUNT:
            raise ConfigError(f"{FILE}: {total} layers; at most {MAX_COUNT} are read")
        attention = Fields(f"{where}.attention", _inner(fields, "attention"))
        mlp = Fields(f"{where}.mlp", _inner(fields, "mlp"))
        norms = _one_of(fields, "norms", NORM_PLACES)
        layer = Layer(_read_attention(attention), _read_mlp(mlp), norms)
        for _ in range(count):
            yield layer


def _check_keys(
    where: str, found: Mapping[str, Any], wanted: Iterable[str], others: Iterable[str]
) -> None:
    """Every key is there, for one that is missing would change what a model computes; none else."""
    unknown = [key for key in found if key not in (*wanted, *others)]
    missing = [key for key in wanted if key not in found]
    for what, keys in (("is not known", unknown), ("is missing", missing)):
        if keys:
            raise ConfigError(f"{where}: {keys[0]} {what}")


def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(each.name for each in dataclass_fields(kind))


def _inner(fields: Fields, key: str) -> Mapping[str, Any]:
    inner = fields.mapping(key)
    if inner is None:
        raise ConfigError(f"{fields.file}: {key} is missing")
    return inner


def _read_attention(fields: Fields) -> Attention:
    _check_keys(fields.file, fields.config, _names(Attention), ())
    num_heads, num_kv_heads = fields.positive("num_heads"), fields.positive("num_kv_heads")
    if num_heads % num_kv_heads:
        raise fields.error("num_kv_heads", f"a divisor of the {num_heads} heads")
    head_dim = fields.positive("head_dim")
    rotary: tuple[int, int] | None = None
    if fields.get("rotary") is not None:
        rows = fields.indices("rotary")
        if len(rows) != 2 or not 0 <= rows[0] < rows[1] <= head_dim or sum(rows) % 2:
            raise fields.error("rotary", f"two numbers up to {head_dim}, an even number apart")
        rotary = (rows[0], rows[1])
    return Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary=rotary,
        window=fields.positive_or_none("window"),
        has_qkv_bias=fields.flag("has_qkv_bias"),
        has_output_bias=fields.flag("has_output_bias"),
        qk_norm=None if fields.get("qk_norm") is None else _one_of(fields, "qk_norm", QK_NORMS),
        scale=_number_or_none(fields, "scale"),
        softcap=_number_or_none(fields, "softcap"),
        rope_theta=_number_or_none(fields, "rope_theta"),
        has_sinks=fields.flag("has_sinks"),
        latent=None if fields.get("latent") is None else _read_latent(fields),
    )


def _read_latent(of: Fields) -> Latent:
    fields = Fields(f"{of.file}.latent", _inner(of, "latent"))
    _check_keys(fields.file, fields.config, _names(Latent), ())
    return Latent(
        q_rank=fields.positive_or_none("q_rank"),
        kv_rank=fields.positive("kv_rank"),
        value_dim=fields.positive("value_dim"),
        rotates_neighbours=fields.flag("rotates_neighbours"),
        norm_eps=fields.number("norm_eps"),
    )


def _read_mlp(fields: Fields) -> Dense | Experts:
    kind = fields.text("kind")
    if kind not in _KINDS:
        raise fields.error("kind", " or ".join(_KINDS))
    _check_keys(fields.file, fields.config, _names(_KINDS[kind]), ("kind",))
    if kind == "dense":
        return Dense(
            intermediate_size=fields.positive("intermediate_size"),
            has_bias=fields.flag("has_bias"),
            is_gated=fields.flag("is_gated"),
        )
    num_experts, top_k = fields.positive("num_experts", MAX_COUNT), fields.positive("top_k")
    if top_k > num_experts:
        raise fields.error("top_k", f"at most the {num_experts} experts")
    num_groups, top_k_groups = fields.positive("num_groups"), fields.positive("top_k_groups")
    if num_experts % num_groups:
        raise fields.error("num_groups", f"a divisor of the {num_experts} experts")
    if top_k_groups > num_groups or top_k > top_k_groups * (num_experts // num_groups):
        raise fields.error(
            "top_k_groups", f"at most the {num_groups} groups, with {top_k} experts among them"
        )
    has_shared_expert = fields.flag("has_shared_expert")
    return Experts(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=fields.positive("intermediate_size"),
        shared_intermediate_size=fields.positive("shared_intermediate_size")
        if has_shared_expert
        else 0,
        has_shared_expert=has_shared_expert,
        has_shared_gate=fields.flag("has_shared_gate"),
        scoring=_one_of(fields, "scoring", SCORINGS),
        is_renormalised=fields.flag("is_renormalised"),
        scale=fields.number("scale"),
        has_correction_bias=fields.flag("has_correction_bias"),
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        has_bias=fields.flag("has_bias"),
        clamped_glu=_read_clamped_glu(fields),
    )


def _read_clamped_glu(fields: Fields) -> tuple[float, float] | None:
    given = fields.get("clamped_glu")
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2 or not all(map(is_number, given)):
        raise fields.error("clamped_glu", "two numbers")
    return float(given[0]), float(given[1])


def _layer_cost(spec: ModelSpec, layer: Layer) -> int:
    """The parameters that a token goes through."""
    attention, mlp = layer.attention, layer.mlp
    rows = 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
    if isinstance(mlp, Experts):
        rows += 3 * (mlp.top_k * mlp.intermediate_size + mlp.shared_intermediate_size)
    else:
        rows += (3 if mlp.is_gated else 2) * mlp.intermediate_size
    return rows * spec.hidden_size


NANOTRON_FAST_CONFIG = register(
    _OwnClass(
        name="NanotronFastConfig",
        option="nanotron-fast",
        marker="is_nanotron_fast_config",
        fields=_FIELDS,
        fields_1_2=None,
        holds=ALL_NEEDS,
        layer_cost=_layer_cost,
        can_rotate_neighbours=False,
        is_stock=False,
    )
)
