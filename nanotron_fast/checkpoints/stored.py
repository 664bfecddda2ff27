"""A checkpoint seen as a model: its family and architecture, and its parameters as it stores them.

Every plan begins here, whichever format the checkpoint is in, and so the same is refused by all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from nanotron_fast.checkpoints.bounds import check_counts
from nanotron_fast.checkpoints.from_shapes import has_param, head_dim_of, moe_sizes_of
from nanotron_fast.checkpoints.names import about_left_over
from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.plan.equality import MustBeEqual
from nanotron_fast.checkpoints.plan.like import check_shapes, read_like
from nanotron_fast.checkpoints.plan.sides import TIED_HEAD, HfSource, NanotronSource, is_ignored
from nanotron_fast.errors import (
    CheckpointError,
    ConfigError,
    NanotronFastError,
    TopologyError,
    UnsupportedModelError,
)
from nanotron_fast.families import (
    Family,
    family_of_config,
    family_of_model_config,
    torchtitan,
    warnings_about,
)
from nanotron_fast.families.hf_config import read_config
from nanotron_fast.families.parts import Param
from nanotron_fast.families.refusals import check_config, rotates_halves
from nanotron_fast.families.unknown_fields import unknown_fields, unknown_fields_warnings
from nanotron_fast.formats.huggingface.checkpoint import CONFIG, HfCheckpoint
from nanotron_fast.formats.huggingface.quantization import (
    names_of_activation_scales,
    read_quantization,
)
from nanotron_fast.formats.nanotron.checkpoint import (
    MODEL_CONFIG,
    OPTIMIZER,
    NanotronCheckpoint,
)
from nanotron_fast.formats.nanotron.classes import NanotronClass, class_of
from nanotron_fast.formats.nanotron.side_file import NAME as SIDE_FILE
from nanotron_fast.formats.nanotron.side_file import read_side_file
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.units import first_few

Checkpoint = HfCheckpoint | NanotronCheckpoint


@contextmanager
def _named(root: Path, configured_by: Path | None = None) -> Iterator[None]:
    """Errors say which checkpoint they are about: of a configuration alone, the code knows none.

    `configured_by` has the config.json, where that is not in `root`. What names a file of either
    folder is left alone, and what is about an option, which is the caller's.
    """
    try:
        yield
    except NanotronFastError as error:
        said = str(error)
        folders = [root, *([] if configured_by is None else [configured_by])]
        # The paths of files in "." begin with the file.
        known = [f"{folder}{mark}" for folder in folders for mark in "/:"]
        if not said.startswith(("--", SIDE_FILE, *known)):
            file = said.partition(":")[0]
            folder = folders[-1] if file == CONFIG else root
            is_there = file in (CONFIG, MODEL_CONFIG) and (folder / file).is_file()
            error.args = (f"{folder}{'/' if is_there else ': '}{said}",)
        raise


class StoredModel:
    """What a checkpoint of either format holds.

    `padded_vocab_size` counts the rows that are stored, `spec.vocab_size` those of the model.
    `is_interleaved`: rotary pairs of q and k lie beside each other, in Nanotron's parameters;
    `tensors_interleaved` says it of the tensors of a published model. `copies_kv_heads`: where
    tensor-parallel ranks outnumber key-value heads, several have a copy of each. `num_predicting`
    counts layers that follow those of the model, and that nothing here computes.
    """

    checkpoint: Checkpoint
    family: Family
    spec: ModelSpec
    padded_vocab_size: int
    is_interleaved: bool
    tensors_interleaved: bool = False
    copies_kv_heads: bool = False
    num_predicting: int = 0
    warnings: list[str]
    # What is left over, whose it would have to be, and where the layers are counted.
    _what: ClassVar[tuple[str, str, str]]

    @property
    def padded_spec(self) -> ModelSpec:
        """The architecture as Nanotron has it, padding included."""
        return replace(self.spec, vocab_size=self.padded_vocab_size)

    def reader(self) -> HfSource | NanotronSource:
        """A side to read from, which notes what is used of it."""
        raise NotImplementedError

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Around what refuses a model for what its configuration says.

        A number that is wrong there looks like a model that nothing can hold: where the tensors
        contradict it, CheckpointError says so instead.
        """
        try:
            with _named(self.checkpoint.root):
                yield
        except UnsupportedModelError:
            self.hold(self.params())
            raise

    def all_warnings(self) -> list[str]:
        """`warnings`, and what is said of what lies beside the weights."""
        return list(self.warnings)

    def hold(self, params: Iterable[Param]) -> HfSource | NanotronSource:
        """Holds tensors to the parameters that they make; returns the reader that has used them.

        Raises CheckpointError.
        """
        reader = self.reader()
        for param in params:
            for part in param.parts:
                reader.pieces(param, part)
        return reader

    def params(
        self,
        *,
        has_rope_pairs: bool = False,
        vocab_size: int | None = None,
        rope_interleaved: bool | None = None,
        tensors_interleaved: bool | None = None,
        copies_kv_heads: bool | None = None,
    ) -> list[Param]:
        """The parameters as they are stored, or with other padding or rotary rows. Family.params"""
        interleaved = self.is_interleaved if rope_interleaved is None else rope_interleaved
        if tensors_interleaved is None:
            tensors_interleaved = self.tensors_interleaved
        return self.family.params(
            self.spec,
            padded_vocab_size=vocab_size or self.padded_vocab_size,
            rope_interleaved=interleaved,
            has_rope_pairs=has_rope_pairs,
            tensors_interleaved=tensors_interleaved,
            copies_kv_heads=self.copies_kv_heads if copies_kv_heads is None else copies_kv_heads,
        )

    def leftovers(self, reader: HfSource | NanotronSource) -> list[str]:
        """What no rule has used. A tied model's second copy is none."""
        if isinstance(self.checkpoint, NanotronCheckpoint):
            return [name for name in self.checkpoint.params if name not in reader.used]
        is_tied = self.spec.tie_word_embeddings
        return [
            name
            for name in self.checkpoint.tensors
            if name not in reader.used
            and not is_ignored(name, self.family.buffers)
            and not (is_tied and name == TIED_HEAD)
        ]

    def check_leftovers(self, reader: HfSource | NanotronSource) -> tuple[MustBeEqual, ...]:
        """Refuses what no rule has used. Raises CheckpointError.

        Returns what to compare of a tied model's second copy: it must be equal.
        """
        unused = self.leftovers(reader)
        if unused:
            what, whose, config = self._what
            hint = about_left_over(
                unused,
                reader.used,
                num_layers=self.spec.num_layers,
                num_predicting=self.num_predicting,
                config=config,
            )
            raise CheckpointError(
                f"{self.checkpoint.root}: {len(unused)} {what} have no place in {whose} "
                f"{self.family.name}: {some(unused)}. {hint}"
            )
        return self.tied_copies(reader)

    def tied_copies(self, reader: HfSource | NanotronSource) -> tuple[MustBeEqual, ...]:
        """What to compare of a tied model's second copy. Raises CheckpointError."""
        if not isinstance(reader, HfSource) or not self.spec.tie_word_embeddings:
            return ()
        return reader.tied_copy() if reader.has_tied_copy else ()


class HfModel(StoredModel):
    """That of a Hugging Face checkpoint."""

    checkpoint: HfCheckpoint
    _what = "tensors", "Nanotron's", CONFIG

    def __init__(self, source: HfCheckpoint, options: Options) -> None:
        """Raises CheckpointError, ConfigError, UnsupportedModelError."""
        if source.lacks_config is not None:
            raise CheckpointError(source.lacks_config)
        with _named(source.root, source.configured_by):
            self._read(source, options)

    def _read(self, source: HfCheckpoint, options: Options) -> None:
        config, self.warnings = check_config(source.config, source.dtypes)
        self.checkpoint = replace(
            source, config=config, quantization=read_quantization(source.config)
        )
        self.warnings += _about_activations(self.checkpoint)
        self.family = family_of_config(config, options.family)
        self.warnings += warnings_about(self.family, config)
        self.spec = read_config(self.family, config)
        self.num_predicting = self.family.num_predicting(config)
        check_counts(self.spec, source)
        self.padded_vocab_size = self.spec.vocab_size
        self.is_interleaved = False
        self.tensors_interleaved = source.rope_interleaved
        if self.tensors_interleaved and self.family.name != torchtitan.MODEL_TYPE:
            raise UnsupportedModelError(
                f"{source.root}: its tensors have the names of torchtitan's "
                f"{torchtitan.MODEL_TYPE}, and the configuration is that of a {self.family.name}"
            )

    def reader(self) -> HfSource:
        """See StoredModel."""
        return HfSource(self.checkpoint)


class NanotronModel(StoredModel):
    """That of a Nanotron checkpoint.

    `side` is what the source's config says, by the side file or by --like, and `target` what the
    checkpoint was written for. `unknown_fields`: those of Nanotron's branches.
    """

    checkpoint: NanotronCheckpoint
    _what = "parameters", "Hugging Face's", MODEL_CONFIG

    def __init__(self, source: NanotronCheckpoint, options: Options) -> None:
        """Raises CheckpointError, ConfigError, UnsupportedModelError."""
        with _named(source.root, options.like):
            self._read(source, options)

    def _read(self, source: NanotronCheckpoint, options: Options) -> None:
        config = source.model_config
        self.checkpoint = source
        self.model_class: NanotronClass = class_of(config)
        self.copies_kv_heads = self.model_class.copies_kv_heads
        self.side = read_side_file(source.root)
        self.target = options.target or (self.side.target if self.side else "nanotron")
        self.like = options.like
        if self.like is not None:
            dtypes = self.side.dtypes if self.side else {}
            self.side = replace(read_like(self.like, options.family), dtypes=dtypes)
        self.family = self._choose_family(config, options.family)
        self.warnings: list[str] = []
        self.is_interleaved = self._is_interleaved(config, options)
        stored = self.model_class.read(
            config, head_dim=head_dim_of(source), moe_sizes=moe_sizes_of(source)
        )
        if self.model_class.ignores_attention_bias:
            stored = stored.with_attention(
                has_qkv_bias=has_param(source, "attn.qkv_proj.bias"),
                has_output_bias=has_param(source, "attn.o_proj.bias"),
            )
        check_counts(stored, source)
        self.unknown_fields = unknown_fields(config, stored)
        self.warnings += unknown_fields_warnings(self.unknown_fields)
        self.padded_vocab_size = stored.vocab_size
        self.spec = replace(stored, vocab_size=self._vocab_size(options.vocab_size))
        if self.like is not None and self.side is not None and self.side.config is not None:
            family = family_of_config(self.side.config, self.family.name)
            check_shapes(self.like, read_config(family, self.side.config), self.spec)

    def reader(self) -> NanotronSource:
        """See StoredModel."""
        return NanotronSource(self.checkpoint)

    def all_warnings(self) -> list[str]:
        """See StoredModel. Who goes on with a training reads its states, and ends with an error."""
        return [*_about_states(self.checkpoint), *self.warnings]

    def _choose_family(self, config: Mapping[str, Any], override: str | None) -> Family:
        name = override or (self.side.family if self.side else None)
        try:
            return family_of_model_config(config, name)
        except UnsupportedModelError:
            if override is not None or self.like is None:
                raise
            raise CheckpointError(
                f"--like {self.like}: it is a {name}, and {self.checkpoint.root} is a "
                f"{self.model_class}, which does not hold one"
            ) from None

    def _is_interleaved(self, config: Mapping[str, Any], options: Options) -> bool:
        """How the rows of q and k lie: as the caller says, or as the configuration does."""
        stated = self.model_class.rope_is_interleaved(config)
        if options.rope_interleaved is not None:
            if options.rope_interleaved and not self.model_class.can_rotate_neighbours:
                raise UnsupportedModelError(rotates_halves(self.model_class))
            return options.rope_interleaved
        is_1_2 = "rope_theta" not in config or options.checkpoint_version == "1.2"
        if stated and "rope_interleaved" not in config and not is_1_2:
            self.warnings.append(
                "model_config.json: no rope_interleaved. A Llama without it was saved before "
                "September 2024, when Nanotron always rotated neighbours, and is read so; "
                "--no-rope-interleaved reads it as rotating halves"
            )
        return stated

    def _vocab_size(self, override: int | None) -> int:
        size = override or (self.side.vocab_size if self.side else self.padded_vocab_size)
        if size > self.padded_vocab_size:
            root = self.checkpoint.root
            whose = f"--like {self.like}" if self.like else str(root / SIDE_FILE)
            raise ConfigError(
                f"{whose if override is None else '--vocab-size'}: a vocabulary of {size} is "
                f"larger than the {self.padded_vocab_size} rows that {root} holds"
            )
        return size


def _about_activations(source: HfCheckpoint) -> list[str]:
    """What is said of scales beside quantised weights that training has no use for."""
    if source.quantization is None:
        return []
    idle = [
        scales
        for name, tensor in source.tensors.items()
        if tensor.info.dtype not in Dtype.__members__
        for scales in names_of_activation_scales(name)
        if scales in source.tensors
    ]
    if not idle:
        return []
    return [
        f"{len(idle)} scales of activations, beside quantised weights, are left out: {some(idle)}"
    ]


def _about_states(source: NanotronCheckpoint) -> list[str]:
    """What is wrong with the states of training beside weights that are whole."""
    if not (source.root / OPTIMIZER).is_dir():
        return []
    from nanotron_fast.formats.nanotron.optimizer import check_beside_weights, find_states

    try:
        check_beside_weights(find_states(source.root), source)
    except (CheckpointError, OSError) as error:
        return [f"the states of training cannot be used: {error}"]
    return []


def stored_model(checkpoint: Checkpoint, options: Options) -> HfModel | NanotronModel:
    """The model that a checkpoint holds.

    Raises CheckpointError, ConfigError, UnsupportedModelError where it makes no sense.
    """
    if isinstance(checkpoint, HfCheckpoint):
        return HfModel(checkpoint, options)
    return NanotronModel(checkpoint, options)


def count_parameters(params: Iterable[Param]) -> int:
    """Elements of every parameter, vocabulary padding left out."""
    total = 0
    for param in params:
        for part in param.parts:
            rows = part.sizes[0] if part.unpadded_rows is None else part.unpadded_rows
            total += rows * part.sizes[1] * part.sizes[2]
    return total


def main_dtype_of(params: list[Param], reader: NanotronSource) -> Dtype:
    """The dtype of most elements."""
    counts: Counter[Dtype] = Counter()
    for param in params:
        counts[reader.dtype(param)] += math.prod(param.shape)
    return counts.most_common(1)[0][0]


def check_divides(params: Iterable[Param], topology: Topology, *, can_pad: bool = True) -> None:
    """Holds every parameter to the ranks. Raises TopologyError.

    `can_pad`: rows may be added to a vocabulary. Layers come first: heads that do not divide are
    worse news than a vocabulary that can be padded.
    """
    for param in sorted(params, key=lambda param: not isinstance(param.block, int)):
        try:
            param.local_shape(topology.sizes)
        except TopologyError as error:
            if not can_pad or isinstance(param.block, int):
                raise
            raise TopologyError(f"{error}; --pad-vocab-to-multiple-of adds rows") from None


def some(names: Iterable[str]) -> str:
    """The first few of many names."""
    return first_few(sorted(names))
