"""The model of a configuration: what model.model_config says, or what lies at init_method.path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.checkpoints import source
from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.stored import NanotronModel, check_divides
from nanotron_fast.errors import CheckpointError, TopologyError, UnsupportedModelError
from nanotron_fast.families import family_of_config, warnings_about
from nanotron_fast.families.parts import Param
from nanotron_fast.families.refusals import check_config, check_kv_heads
from nanotron_fast.formats.huggingface.checkpoint import CONFIG
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron.checkpoint import is_nanotron_checkpoint, read_nanotron
from nanotron_fast.formats.nanotron.stages import Stages
from nanotron_fast.model.topology import Topology
from nanotron_fast.models.architecture import Architecture
from nanotron_fast.train.config import CheckpointInit, TrainingConfig
from nanotron_fast.train.config.checks import check_lengths
from nanotron_fast.train.config.place import Place


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model, and how a configuration spreads it over ranks.

    Args:
        architecture: what is built. The vocabulary of its spec is padded, to a multiple of
            make_vocab_size_divisible_by * tp; its vocab_size counts the ids that can occur.
        params: every parameter of it, in the order of the layers.
        given: model.model_config, where there is one.
        topology: tp, pp and ep.
        chunks: parts of the model on each pipeline rank.
        warnings: what to tell about the source.
        min_rows: of the vocabulary, whatever the ranks need.
    """

    architecture: Architecture
    params: tuple[Param, ...]
    given: Mapping[str, Any] | None
    topology: Topology
    chunks: int
    warnings: tuple[str, ...] = ()
    min_rows: int = 0

    @property
    def model_config(self) -> dict[str, Any]:
        """Every field of the class, the vocabulary padded, for the checkpoints of a run."""
        if self.given is not None:
            return {**self.given, "vocab_size": self.architecture.spec.vocab_size}
        return self.architecture.model_config()

    def stages(self) -> Stages:
        """What each stage of the model owns, chunks being stages of their own.

        Stage s lies on pipeline rank s % pp. Raises TopologyError where one would own nothing.
        """
        topology = Topology(tp=self.topology.tp, pp=self.topology.pp * self.chunks)
        return Stages(self.architecture.spec, self.architecture.model_class, topology)

    def spread(self, config: TrainingConfig) -> ModelPlan:
        """The same model over the ranks of another configuration.

        Raises TopologyError, and UnsupportedModelError where experts are to be split of a model
        that stock Nanotron has.
        """
        layout = config.parallelism
        multiple = config.model.make_vocab_size_divisible_by * layout.tp
        padded = self.architecture.padded_to(multiple, min_rows=self.min_rows)
        # With many experts there are tens of thousands of parts, so they are made but once.
        is_same = bool(self.params) and padded == self.architecture
        params = self.params if is_same else tuple(padded.params())
        topology = Topology(tp=layout.tp, pp=layout.pp, ep=layout.expert_parallel_size)
        place = config.place.at("parallelism")
        _check_experts(padded, topology, place.at("expert_parallel_size"))
        # The checkpoints of the run are of its class, and so that decides.
        way = (
            f"start from what nanotron-fast convert --target nanotron-fast --tp {layout.tp} "
            "writes, whose ranks have copies"
        )
        with _named(place.at("tp"), layout.tp):
            check_kv_heads(params, padded.model_class, padded.spec, layout.tp, way=way)
            check_divides(params, Topology(tp=layout.tp))
        with _named(place.at("expert_parallel_size"), topology.ep):
            check_divides(params, Topology(ep=topology.ep))
        plan = replace(
            self, architecture=padded, params=params, topology=topology, chunks=layout.chunks
        )
        plan._check_stages(place)
        return plan

    def _check_stages(self, place: Place) -> None:
        """Refuses more stages than there are blocks to fill them. Raises TopologyError."""
        pp, chunks = self.topology.pp, self.chunks
        if self._runs(pp * chunks):
            return
        fits = [count for count in range(1, chunks) if self._runs(pp * count)]
        if fits:
            last = f"pp_chunks={fits[-1]}" if fits[-1] > 1 else "pp_engine=1f1b"
        else:
            most = max(count for count in range(1, pp + 1) if self._runs(count))
            last = f"pp={most}" + (" and --parallelism.pp_engine=1f1b" if chunks > 1 else "")
        interleaved = f" x pp_chunks={chunks}" if chunks > 1 else ""
        raise TopologyError(
            f"{place.at('pp')} is {pp}{interleaved}, which is too many for this model: by "
            "Nanotron's own assignment some stage would own nothing of its "
            f"{self.architecture.spec.num_layers} layers, norm and head; set --parallelism.{last}"
        )

    def _runs(self, stages: int) -> bool:
        """Whether each of so many stages would own something."""
        try:
            self.architecture.blocks_by_stage(Topology(tp=self.topology.tp, pp=stages))
        except TopologyError:
            return False
        return True


def architecture(config: TrainingConfig, *, min_rows: int = 0) -> ModelPlan:
    """The model that a configuration trains; no weights are read.

    `min_rows` of the vocabulary there are at least, whatever the ranks need.

    Raises ConfigError, CheckpointError, UnsupportedModelError where it is none, TopologyError where
    it does not spread over the ranks, OSError.
    """
    given = config.model.model_config
    if given is not None:
        found = Architecture.of_model_config(given)
        place = config.place.at("model.model_config")
        warnings = [*_without_effect(found, given, place), *_dropout(found, place)]
    else:
        init = config.model.init_method
        assert isinstance(init, CheckpointInit)  # or the configuration was refused
        where = config.place.at("model.init_method.path")
        found, warnings = _from_checkpoint(init.path, where)
        warnings += _dropout(found, where)
    _check_balance(found, config)
    check_lengths(config, found.spec, config.place)
    plan = ModelPlan(found, (), given, Topology(), 1, tuple(warnings), min_rows)
    return plan.spread(config)


@contextmanager
def _named(place: Place, size: int) -> Iterator[None]:
    """An error about ranks begins with what says how many there are."""
    try:
        yield
    except TopologyError as error:
        raise TopologyError(f"{place} is {size}: {error}") from None


def _check_experts(model: Architecture, topology: Topology, place: Place) -> None:
    """Refuses experts split over ranks that there are not, or that the model's class cannot name.

    Raises TopologyError, UnsupportedModelError.
    """
    if topology.ep == 1:
        return
    if model.spec.moe is None:
        raise TopologyError(
            f"{place} is {topology.ep}, and the model has no experts to split over ranks"
        )
    if model.model_class.is_stock:
        raise UnsupportedModelError(
            f"{place} is {topology.ep}, and Nanotron's {model.model_class} has no experts split "
            "over ranks: train what nanotron-fast convert --target nanotron-fast --model-class "
            "nanotron-fast makes of the model"
        )


def _check_balance(model: Architecture, config: TrainingConfig) -> None:
    """Refuses to balance experts that there are not, or by a bias that there is not. ConfigError"""
    section, place, experts = config.optimizer, config.place.at("optimizer"), model.spec.moe
    if section.router_aux_loss and experts is None:
        raise place.at("router_aux_loss").error(
            f" is {section.router_aux_loss:g}, and the model has no experts"
        )
    if section.router_bias_rate and (experts is None or not experts.has_correction_bias):
        raise place.at("router_bias_rate").error(
            f" is {section.router_bias_rate:g}, and the model has "
            + ("no experts" if experts is None else "routers without a correction bias")
            + ("" if experts is None else ": router_aux_loss balances them")
        )


def _without_effect(found: Architecture, given: Mapping[str, Any], place: Place) -> list[str]:
    """What Nanotron's class has a field for, and computes nothing of."""
    if not (found.model_class.ignores_attention_bias and given.get("attention_bias")):
        return []
    return [
        f"{place.at('attention_bias')} has no effect: whatever it says, Nanotron's "
        f"{found.model_class} has no biases"
    ]


def _dropout(found: Architecture, place: Place) -> list[str]:
    """Rates of dropout, which pretraining has long left out."""
    rates = {name: rate for name, rate in found.spec.extras.items() if name.endswith("dropout")}
    asked = [f"{name} {rate:g}" for name, rate in rates.items() if rate]
    return [f"{place}: {', '.join(asked)} without effect: nothing is dropped"] if asked else []


def _from_checkpoint(path: str, where: Place) -> tuple[Architecture, list[str]]:
    """The model in a folder of either format, or of a Hub id, and what to tell about it."""
    root = source.resolve_companions(path, str(where))
    if is_nanotron_checkpoint(root):
        model = NanotronModel(read_nanotron(root), Options())
        found = Architecture.of_stored(model)
        warnings = list(model.warnings)
        if model.spec.rope_scaling and not found.spec.rope_scaling:
            warnings.append(
                f"{root}: its rope_scaling is left out: Nanotron, which it was written for, stores "
                "it and computes without. model.model_config with a rope_scaling is honoured"
            )
        return found, warnings
    if not (root / CONFIG).is_file():
        raise CheckpointError(
            f"{where} is {path}, which is neither a Hugging Face folder (config.json) nor a "
            "Nanotron checkpoint (model_config.json and model/)"
        )
    kept, warnings = check_config(read_json_object(root / CONFIG), ())
    warnings += warnings_about(family_of_config(kept), kept)
    return Architecture.of_hf_config(kept), warnings
