"""A model without its weights: its architecture, its table of parameters, what its stages own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanotron_fast.checkpoints.options import LoadChoices, Options
from nanotron_fast.checkpoints.plan import load
from nanotron_fast.checkpoints.source import read, resolve
from nanotron_fast.checkpoints.stored import HfModel, NanotronModel, stored_model
from nanotron_fast.errors import TopologyError, UnsupportedModelError
from nanotron_fast.families import (
    Family,
    family_named,
    family_of_config,
    family_of_model_config,
    family_of_spec,
)
from nanotron_fast.families.hf_config import read_config
from nanotron_fast.families.parts import Param
from nanotron_fast.families.refusals import check_model, choose_class
from nanotron_fast.formats.nanotron.classes import NanotronClass, class_of
from nanotron_fast.formats.nanotron.stages import Stages
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.models.names import names_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The name that a tied matrix has a second time where a model's ends lie on two stages.
HEAD = load.HEAD
Block = int | str
# Of the checkpoints that this package trains.
VERSION = "1.5"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model without its weights.

    Args:
        family: whose table names the parameters.
        spec: `vocab_size` counts the rows that are trained, padding included.
        model_class: by which Nanotron assigns layers to stages.
        rope_interleaved: rotary pairs lie beside each other in q and k.
        vocab_size: of the tokenizer: ids that can occur.
    """

    family: Family
    spec: ModelSpec
    model_class: NanotronClass
    rope_interleaved: bool
    vocab_size: int

    @classmethod
    def of_spec(
        cls,
        spec: ModelSpec,
        *,
        family: str | None = None,
        model_class: str = "auto",
        rope_interleaved: bool = False,
        padded_vocab_size: int | None = None,
    ) -> Architecture:
        """That of a spec. The family is found by what the spec says, unless it is named.

        Raises ConfigError, UnsupportedModelError.
        """
        named = family_of_spec(spec) if family is None else family_named(family)
        found = cls._of_hf(named, spec, model_class, rope_interleaved)
        return replace(found, spec=replace(spec, vocab_size=padded_vocab_size or spec.vocab_size))

    @classmethod
    def of_model_config(cls, config: Mapping[str, Any]) -> Architecture:
        """That of a `model_config`, as Nanotron's YAML has it. A rope_scaling is honoured.

        Raises ConfigError, UnsupportedModelError.
        """
        model_class = class_of(config)
        family = family_of_model_config(config)
        full = {**model_class.fields, **config}
        spec = _as_computed_by(model_class, model_class.read(full))
        if model_class.ignores_attention_bias:
            spec = spec.with_attention(has_qkv_bias=False)
        interleaved = model_class.rope_is_interleaved(full)
        return cls._checked(family, spec, model_class, interleaved, spec.vocab_size)

    @classmethod
    def of_hf_config(cls, config: Mapping[str, Any]) -> Architecture:
        """That of a Hugging Face `config.json`, of which `families.refusals` have seen nothing odd.

        Raises ConfigError, UnsupportedModelError.
        """
        family = family_of_config(config)
        return cls._of_hf(family, read_config(family, config))

    @classmethod
    def of_stored(
        cls, model: HfModel | NanotronModel, options: Options | None = None
    ) -> Architecture:
        """That of a checkpoint's model, its vocabulary with the padding that is stored.

        `options` are those of the load. From Hugging Face, what stock Nanotron cannot compute is
        computed. A rope_scaling that a stock class of Nanotron's was trained without is left out.

        Raises ConfigError, UnsupportedModelError.
        """
        options = options or Options()
        interleaved = options.rope_interleaved
        if interleaved is None:
            interleaved = model.is_interleaved
        if isinstance(model, HfModel):
            return cls._of_hf(model.family, model.spec, options.model_class, interleaved)
        spec = _as_computed_by(model.model_class, model.padded_spec)
        if model.model_class.is_stock and model.target != "nanotron-fast":
            spec = replace(spec, rope_scaling=None)
        return cls._checked(
            model.family, spec, model.model_class, interleaved, model.spec.vocab_size
        )

    @classmethod
    def of_checkpoint(cls, path: str | Path, **choices: Unpack[LoadChoices]) -> Architecture:
        """That of a checkpoint in either format, by the options of `load_into`; see `of_stored`.

        Raises CheckpointError, ConfigError, UnsupportedModelError.
        """
        wanted = Options.of(with_our_target(choices), LoadChoices)
        # How rows shall lie in memory, and what our models can compute, is no word on what is
        # stored: there the checkpoint decides, or the caller's own target.
        options = replace(wanted, rope_interleaved=None, target=choices.get("target"))
        model = stored_model(read(resolve(path)).without(options.ignore_tensors), options)
        found = cls.of_stored(model, wanted)
        multiple = wanted.pad_vocab_to_multiple_of
        return found if multiple is None else found.padded_to(multiple)

    @classmethod
    def _of_hf(
        cls, family: Family, spec: ModelSpec, option: str = "auto", interleaved: bool = False
    ) -> Architecture:
        chosen = choose_class(family, spec, option, "nanotron-fast")
        return cls._checked(family, spec, chosen, interleaved, spec.vocab_size)

    @classmethod
    def _checked(
        cls,
        family: Family,
        spec: ModelSpec,
        model_class: NanotronClass,
        interleaved: bool,
        vocab_size: int,
    ) -> Architecture:
        """Raises UnsupportedModelError where nothing here computes it."""
        _check(family, spec, model_class, interleaved)
        return cls(family, spec, model_class, interleaved, vocab_size)

    def padded_to(self, multiple: int, *, min_rows: int = 0) -> Architecture:
        """The same with the fewest rows for its vocabulary that are a multiple of `multiple`."""
        rows = -(-max(self.vocab_size, min_rows) // multiple) * multiple
        return replace(self, spec=replace(self.spec, vocab_size=rows))

    def model_config(self) -> dict[str, Any]:
        """Every field of the class, for a checkpoint of it; the vocabulary with its padding."""
        return self.model_class.write(
            self.spec,
            family=self.family.name,
            version=VERSION,
            rope_interleaved=self.rope_interleaved,
        )

    def params(self) -> list[Param]:
        """Every parameter of the whole model, as the family's table has it."""
        return self.family.params(
            replace(self.spec, vocab_size=self.vocab_size),
            padded_vocab_size=self.spec.vocab_size,
            rope_interleaved=self.rope_interleaved,
            copies_kv_heads=True,
        )

    def blocks_of(self, topology: Topology, stage: int) -> tuple[Block, ...]:
        """The blocks of a stage by Nanotron's assignment: "embedding", layers, "norm", "head".

        Raises TopologyError where some stage would own none.
        """
        return self.blocks_by_stage(topology)[stage]

    def blocks_by_stage(self, topology: Topology) -> list[tuple[Block, ...]]:
        """Those of every stage. Raises TopologyError where one would own none.

        Nanotron's last stage may compute the loss alone; here the loss is a part of the head.
        """
        stages = Stages(self.spec, self.model_class, topology)
        found = [
            tuple(block for block in self.blocks if stages.of(block) == stage)
            for stage in range(topology.pp)
        ]
        used = sum(1 for blocks in found if blocks)
        if used < topology.pp:
            raise TopologyError(
                f"pp={topology.pp}: {self.spec.num_layers} layers, norm and head fill {used} "
                "stages by Nanotron's own assignment, and the last would have the loss alone"
            )
        return found

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in their order."""
        return ("embedding", *range(self.spec.num_layers), "norm", "head")


def with_our_target(choices: LoadChoices) -> LoadChoices:
    """The choices of a load into this package's models, which compute what Nanotron's cannot."""
    return choices if choices.get("target") else {**choices, "target": "nanotron-fast"}


def _as_computed_by(model_class: NanotronClass, spec: ModelSpec) -> ModelSpec:
    """Nanotron gives a layer without rotary embedding no window, whatever the others have."""
    if not model_class.is_stock:
        return spec
    layers = (
        replace(each, attention=replace(each.attention, window=None))
        if each.attention.rotary is None
        else each
        for each in spec.layers
    )
    return replace(spec, layers=tuple(layers))


def _check(
    family: Family, spec: ModelSpec, model_class: NanotronClass, rope_interleaved: bool
) -> None:
    """Refuses what nothing here computes. Raises UnsupportedModelError."""
    names_of(family)
    for number, layer in enumerate(spec.layers):
        attention = layer.attention
        rotary = attention.rotary
        if attention.latent is not None and (rotary is None or rotary[1] != attention.head_dim):
            raise UnsupportedModelError(
                f"layer {number}: the rotary embedding turns rows {rotary} of a head of "
                f"{attention.head_dim}: latent attention turns its last ones"
            )
        if attention.latent is None and rotary is not None and rotary[0] != 0:
            raise UnsupportedModelError(
                f"layer {number}: the rotary embedding turns rows {rotary[0]} to {rotary[1]} of a "
                "head: nanotron_fast.models turns rows from the first on"
            )
    if rope_interleaved and not model_class.can_rotate_neighbours:
        check_model(
            family,
            spec,
            model_class,
            target="nanotron-fast",
            version=VERSION,
            rope_interleaved=rope_interleaved,
        )
