"""The model of a configuration: what model.model_config says, or what lies at init_method.path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.checkpoints import source
from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.stored import NanotronModel, check_divides
from nanotron_fast.errors import CheckpointError
from nanotron_fast.families import Family, family_of_config, family_of_model_config, warnings_about
from nanotron_fast.families.hf_config import read_config
from nanotron_fast.families.parts import Param
from nanotron_fast.families.refusals import check_config, choose_class
from nanotron_fast.formats.huggingface.checkpoint import CONFIG
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron.checkpoint import is_nanotron_checkpoint, read_nanotron
from nanotron_fast.formats.nanotron.classes import NanotronClass, class_of
from nanotron_fast.formats.nanotron.stages import Stages
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.models.architecture import Architecture as BuiltArchitecture
from nanotron_fast.train.config import CheckpointInit, TrainingConfig
from nanotron_fast.train.config.checks import check_lengths
from nanotron_fast.train.config.place import Place

_VERSION = "1.5"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model, and how its configuration spreads it over ranks.

    Args:
        spec: as the source has it, its vocabulary not padded.
        family: whose table has its parameters.
        model_class: whose model_config.json a checkpoint of it has.
        rope_interleaved: rotary pairs lie beside each other in q and k.
        given: model.model_config, where there is one.
        padded_vocab_size: rows of embedding and head, a multiple of tp.
        params: every parameter, in the order of the layers, the vocabulary padded.
        topology: tp and pp.
        chunks: parts of the model on each pipeline rank.
        warnings: what to tell about the source.
    """

    spec: ModelSpec
    family: Family
    model_class: NanotronClass
    rope_interleaved: bool
    given: Mapping[str, Any] | None
    padded_vocab_size: int
    params: tuple[Param, ...]
    topology: Topology
    chunks: int
    warnings: tuple[str, ...] = ()

    @property
    def padded_spec(self) -> ModelSpec:
        """The model with the rows that its vocabulary is padded to."""
        return replace(self.spec, vocab_size=self.padded_vocab_size)

    @property
    def model_config(self) -> dict[str, Any]:
        """Every field of the class, the vocabulary padded: what its checkpoints are written with.

        Raises UnsupportedModelError.
        """
        if self.given is not None:
            return {**self.given, "vocab_size": self.padded_vocab_size}
        return self.model_class.write(
            self.padded_spec,
            family=self.family.name,
            version=_VERSION,
            rope_interleaved=self.rope_interleaved,
        )

    @property
    def built(self) -> BuiltArchitecture:
        """What `nanotron_fast.models` builds. Raises UnsupportedModelError."""
        whole = BuiltArchitecture.of_model_config(self.model_config)
        return replace(whole, vocab_size=self.spec.vocab_size)

    def stages(self) -> Stages:
        """What each stage of the model owns, chunks being stages of their own.

        Stage s lies on pipeline rank s % pp. Raises TopologyError where one would own nothing.
        """
        num_stages = self.topology.pp * self.chunks
        topology = Topology(tp=self.topology.tp, pp=num_stages)
        return Stages(self.padded_spec, self.model_class, topology)

    def spread(self, config: TrainingConfig) -> Architecture:
        """The same model over the ranks of another configuration. Raises TopologyError."""
        layout = config.parallelism
        multiple = config.model.make_vocab_size_divisible_by * layout.tp
        padded = -(-self.spec.vocab_size // multiple) * multiple
        params = self.params
        # With many experts there are tens of thousands of parts, so they are made but once.
        if padded != self.padded_vocab_size or not params:
            params = tuple(
                self.family.params(
                    self.spec, padded_vocab_size=padded, rope_interleaved=self.rope_interleaved
                )
            )
        topology = Topology(tp=layout.tp, pp=layout.pp)
        check_divides(params, topology)
        return replace(
            self,
            padded_vocab_size=padded,
            params=params,
            topology=topology,
            chunks=layout.chunks,
        )


def architecture(config: TrainingConfig) -> Architecture:
    """The model that a configuration trains; no weights are read.

    Raises ConfigError, CheckpointError, UnsupportedModelError where it is none, TopologyError where
    it does not spread over the ranks, OSError.
    """
    given = config.model.model_config
    if given is not None:
        model_class = class_of(given)
        spec = model_class.read(given)
        family = family_of_model_config(given)
        is_interleaved = model_class.rope_is_interleaved(given)
        warnings: list[str] = []
    else:
        init = config.model.init_method
        assert isinstance(init, CheckpointInit)  # or the configuration was refused
        where = config.place.at("model.init_method.path")
        spec, family, model_class, is_interleaved, warnings = _from_checkpoint(init.path, where)
    check_lengths(config, spec.max_position_embeddings, config.place)
    return Architecture(
        spec=spec,
        family=family,
        model_class=model_class,
        rope_interleaved=is_interleaved,
        given=given,
        padded_vocab_size=spec.vocab_size,
        params=(),
        topology=Topology(),
        chunks=1,
        warnings=tuple(warnings),
    ).spread(config)


def _from_checkpoint(
    path: str, where: Place
) -> tuple[ModelSpec, Family, NanotronClass, bool, list[str]]:
    """What a folder of either format, or a Hub id, says of its model."""
    root = source.resolve_companions(path)
    if is_nanotron_checkpoint(root):
        model = NanotronModel(read_nanotron(root), Options())
        return model.spec, model.family, model.model_class, model.is_interleaved, model.warnings
    if not (root / CONFIG).is_file():
        raise CheckpointError(
            f"{where} is {path}, which is neither a Hugging Face folder (config.json) nor a "
            "Nanotron checkpoint (model_config.json and model/)"
        )
    kept, warnings = check_config(read_json_object(root / CONFIG), ())
    family = family_of_config(kept)
    spec = read_config(family, kept)
    model_class = choose_class(family, spec, "auto", "nanotron-fast")
    return spec, family, model_class, False, [*warnings, *warnings_about(family, kept)]
