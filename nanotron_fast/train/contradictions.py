"""A model_config beside the checkpoint that its weights come from: they have to be one model."""

from __future__ import annotations

from pathlib import Path

from nanotron_fast.errors import ConfigError
from nanotron_fast.model.spec import COMPUTED, STRUCTURE
from nanotron_fast.models.architecture import Architecture
from nanotron_fast.train.config.place import Place


def check_against_weights(given: Architecture, weights: Path, place: Place) -> list[str]:
    """Refuses another model than the checkpoint holds; says where it is computed otherwise.

    Args:
        given: the model of model.model_config.
        weights: a checkpoint in either format.
        place: of model.model_config.

    Raises ConfigError, and what reading the checkpoint's configuration raises.
    """
    stored = Architecture.of_checkpoint(weights)
    told = []
    for name in COMPUTED:
        ours, theirs = getattr(given.spec, name), getattr(stored.spec, name)
        if name == "vocab_size":
            # Without its padding on one side, perhaps.
            ours, theirs = given.vocab_size, stored.vocab_size
            if ours in (theirs, stored.spec.vocab_size):
                continue
        if ours == theirs or name == "layers":
            continue
        if name in STRUCTURE:
            raise ConfigError(
                f"{place}: {name} is {ours}, and {weights} holds a model with {theirs}: leave "
                "model_config out to take the checkpoint's, or give that model's"
            )
        told.append(
            f"{place}: {name} is {ours}, and the model in {weights} was computed with {theirs}"
        )
    return told
