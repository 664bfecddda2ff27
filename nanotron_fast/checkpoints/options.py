"""What a caller may choose about a conversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nanotron_fast.errors import ConfigError
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.dtypes import Dtype

DIRECTIONS = ("nanotron", "hf")
DEFAULT_SHARD_BYTES = 5 * 10**9
# Said where there are more tensors than a model has.
IGNORE_HINT = "--ignore-tensors GLOB leaves out what is not wanted"
_MAX_ROWS = 2**31


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of `convert` and `plan`, checked. None means: decided from the source."""

    topology: Topology = field(default_factory=Topology)
    cast: Dtype | None = None
    model_class: str = "auto"
    family: str | None = None
    target: str | None = None
    # To Nanotron: the layout to write. From it: the layout that is there, whatever its config says.
    rope_interleaved: bool | None = None
    checkpoint_version: str | None = None
    pad_vocab_to_multiple_of: int | None = None
    vocab_size: int | None = None
    max_shard_bytes: int | None = None
    # Folders whose tokenizer, and whose configuration too, take the place of the source's.
    tokenizer: Path | None = None
    like: Path | None = None
    ignore_tensors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (
            ("--pad-vocab-to-multiple-of", self.pad_vocab_to_multiple_of),
            ("--vocab-size", self.vocab_size),
        ):
            if value is not None and not 1 <= value <= _MAX_ROWS:
                bound = "at least 1" if value < 1 else f"at most {_MAX_ROWS}"
                raise ConfigError(f"{name} {value}: it should be {bound}")

    def reject_for(self, direction: str) -> None:
        """Refuses choices that mean nothing in a direction. Raises ConfigError."""
        if direction == "hf":
            given = {
                "--tp": self.topology.tp != 1,
                "--pp": self.topology.pp != 1,
                "--model-class": self.model_class != "auto",
                "--pad-vocab-to-multiple-of": self.pad_vocab_to_multiple_of is not None,
            }
            what = "writing a Hugging Face checkpoint"
        elif direction == "resharding":
            given = {
                "--dtype": self.cast is not None,
                "--model-class": self.model_class != "auto",
                "--checkpoint-version": self.checkpoint_version is not None,
                "--pad-vocab-to-multiple-of": self.pad_vocab_to_multiple_of is not None,
                "--vocab-size": self.vocab_size is not None,
                "--max-shard-size": self.max_shard_bytes is not None,
                "--like": self.like is not None,
            }
            what = "writing a Nanotron checkpoint at another topology"
        else:
            given = {
                "--vocab-size": self.vocab_size is not None,
                "--max-shard-size": self.max_shard_bytes is not None,
                "--like": self.like is not None,
            }
            what = "writing a Nanotron checkpoint"
        for name, is_given in given.items():
            if is_given:
                raise ConfigError(f"{name}: it has no meaning when {what}")
