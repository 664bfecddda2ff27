"""All batches of a run: the data stages of a configuration, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nanotron_fast.checkpoints.source import resolve_companions
from nanotron_fast.errors import DataError
from nanotron_fast.train.architecture import architecture
from nanotron_fast.train.config.data import HfDataset, Nanoset, SftDataset
from nanotron_fast.train.config.sections import CheckpointInit
from nanotron_fast.train.data.batches import Batches, MicroBatch
from nanotron_fast.train.data.blend import BlendedSamples, BlendOrder
from nanotron_fast.train.data.cache import Progress, cached_tokens
from nanotron_fast.train.data.conversations import ChatRecipe
from nanotron_fast.train.data.encode import TextRecipe
from nanotron_fast.train.data.held_out import divided
from nanotron_fast.train.data.nanoset import TokenFolder
from nanotron_fast.train.data.packing import PackedConversations
from nanotron_fast.train.data.samples import ENDLESS, Part, Samples
from nanotron_fast.train.data.synthetic import SyntheticSamples
from nanotron_fast.train.data.text import open_source
from nanotron_fast.train.data.tokenizer import (
    check_vocabulary,
    fingerprint,
    load_tokenizer,
    recipe,
    token_size,
    vocabulary,
)
from nanotron_fast.train.data.windows import TextWindows
from nanotron_fast.train.sources import named

if TYPE_CHECKING:
    from nanotron_fast.train.config.data import DataStage
    from nanotron_fast.train.config.training_config import TrainingConfig

# Synthetic samples for validation: those that no run comes to.
_FAR = 2**62


@dataclass(frozen=True, slots=True)
class Consumed:
    """How far a run had come that goes on: after a step, the samples taken of each data stage.

    Only a run whose batches had another size then needs to know.

    Args:
        step: the last one that was done; 0 for a new run.
        samples: of each stage, in the order of their steps; stages that are missing had none.
    """

    step: int = 0
    samples: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBatches:
    """One data stage.

    Args:
        name: of the stage.
        first_step, last_step: of the stage.
        sequence_length: in tokens.
        training: its batches, by the step of the whole run.
        validation: those of a validation, at step 1; None where there is none.
        folders: of a Nanoset, and the order in which they are blended; empty for other data.
    """

    name: str
    first_step: int
    last_step: int
    sequence_length: int
    training: Batches
    validation: Batches | None
    folders: tuple[str, ...] = ()
    order: BlendOrder | None = None

    def consumed_samples(self, step: int) -> int:
        """Samples of this stage that are taken once a step of the run is done."""
        begun = self.training
        last = min(step, self.last_step)
        if last < begun.first_step - 1:
            raise ValueError(f"step {step} comes before step {begun.first_step - 1}")
        return begun.consumed + (last + 1 - begun.first_step) * begun.samples_per_step

    def consumed_tokens(self, step: int) -> dict[str, int]:
        """The same in tokens of each folder of a Nanoset; empty for other data."""
        if self.order is None or self.consumed_samples(step) == 0:
            return {}
        tokens: dict[str, int] = {}
        taken = self.order.taken(self.consumed_samples(step))
        for folder, count in zip(self.folders, taken, strict=True):
            tokens[folder] = tokens.get(folder, 0) + count * self.sequence_length
        return tokens


@dataclass(frozen=True, slots=True)
class StagedBatches:
    """The batches of one data-parallel rank over a whole run.

    Args:
        stages: by their steps.
        notes: what a user may want to know about the data, each a sentence.
    """

    stages: tuple[StageBatches, ...]
    notes: tuple[str, ...] = ()

    def stage_at(self, step: int) -> StageBatches:
        """The data stage of a step, counted from 1."""
        return self._begun(step)[-1]

    def batch(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, counted from 1. Raises DataError."""
        return self.stage_at(step).training.batch(step)

    def validation(self, step: int) -> list[MicroBatch]:
        """The micro-batches of the validation after a step: the same each time within a stage.

        None of their samples is trained on. Empty where the configuration asks for no validation.
        """
        batches = self.stage_at(step).validation
        return [] if batches is None else batches.batch(1)

    def consumed(self, step: int) -> list[dict[str, Any]]:
        """What each stage that was begun has given once a step is done, the one in use last.

        In the words of Nanotron's `checkpoint_metadata.json`.
        """
        return [
            {
                "name": stage.name,
                "sequence_length": stage.sequence_length,
                "start_training_step": stage.first_step,
                "consumed_train_samples": stage.consumed_samples(step),
                "consumed_tokens_per_dataset_folder": stage.consumed_tokens(step),
            }
            for stage in self._begun(step)
        ]

    def tokens(self, step: int) -> int:
        """Tokens of all ranks that are taken once a step is done."""
        return sum(
            stage.consumed_samples(step) * stage.sequence_length for stage in self._begun(step)
        )

    def _begun(self, step: int) -> list[StageBatches]:
        return [stage for stage in self.stages if stage.first_step <= max(step, 1)]


def batches_of(
    config: TrainingConfig,
    *,
    dp_rank: int = 0,
    vocab_size: int | None = None,
    consumed: Consumed | None = None,
    is_first_rank: bool = True,
    on_progress: Progress | None = None,
) -> StagedBatches:
    """Opens the data of a configuration, and makes tokens of text where that was not done before.

    Every rank may call it at once: one on each machine makes the tokens, and the others wait. To
    have an error once and not from every rank, let the first rank go before the others.

    Args:
        config: all of it; an architecture that it leaves out is read where its weights lie.
        dp_rank: of the ranks that the configuration names.
        vocab_size: of the model; None for what its architecture says.
        consumed: of a run that goes on with batches of another size than before; None where they
            have the same size, or for a new run.
        is_first_rank: it alone heeds dataset_overwrite_cache.
        on_progress: called with the bytes of text that are done and that there are.

    Raises:
        DataError: data are missing, malformed, or not for this model.
        CheckpointError: a tokenizer or an architecture is not where it should be.
        OSError: documents cannot be read.
    """
    if config.model.model_config is None or vocab_size is None:
        model = architecture(config)
        config = config.with_model_config(model.model_config)
        vocab_size = model.architecture.vocab_size if vocab_size is None else vocab_size
    opened = _Opening(config, vocab_size, is_first_rank, on_progress)
    done = consumed or Consumed()
    reached = [
        stage
        for stage in config.data_stages
        if stage.start_training_step <= max(config.tokens.train_steps, 1)
    ]
    lasts = [stage.start_training_step - 1 for stage in reached[1:]]
    lasts.append(max(config.tokens.train_steps, reached[-1].start_training_step))
    stages: list[StageBatches] = []
    for number, (stage, last_step) in enumerate(zip(reached, lasts, strict=True)):
        taken = done.samples[number] if number < len(done.samples) else 0
        stages.append(opened.stage(stage, last_step, max(done.step, 0), taken, dp_rank, stages))
    return StagedBatches(tuple(stages), tuple(opened.notes))


@dataclass(frozen=True, slots=True)
class _Data:
    """What a stage's data are made of."""

    training: Samples
    validation: Samples | None
    # Samples in one reading; None where there is no end.
    size: int | None
    # Those that a validation has to take from; None where there is no end.
    validation_size: int | None = None
    is_packed: bool = False
    folders: tuple[str, ...] = ()
    order: BlendOrder | None = None


@dataclass
class _Opening:
    """Builds one stage after another."""

    config: TrainingConfig
    vocab_size: int
    is_first_rank: bool
    on_progress: Progress | None
    notes: list[str] = field(default_factory=list)

    def stage(
        self,
        stage: DataStage,
        last_step: int,
        done_step: int,
        taken: int,
        dp_rank: int,
        before: list[StageBatches],
    ) -> StageBatches:
        """The next stage, after those that come before."""
        tokens, dp = self.config.tokens, self.config.parallelism.dp
        length = stage.sequence_length or tokens.sequence_length
        data = self._data(stage, length, before)
        keeps_apart = data.is_packed or self._model_flag("_use_doc_masking")
        training = Batches(
            samples=data.training,
            sequence_length=length,
            micro_batch_size=tokens.micro_batch_size,
            accumulation=tokens.batch_accumulation_per_replica,
            dp=dp,
            dp_rank=dp_rank,
            first_step=max(stage.start_training_step, min(done_step, last_step) + 1),
            consumed=taken,
            keeps_documents_apart=keeps_apart,
            learns_first_tokens=self._model_flag("is_qwen2_config") and not keeps_apart,
            vocab_size=self.vocab_size,
        )
        validation = None
        if data.validation is not None:
            validation = replace(
                training,
                samples=data.validation,
                accumulation=tokens.limit_val_batches,
                first_step=1,
                consumed=0,
            )
        result = StageBatches(
            name=stage.name,
            first_step=stage.start_training_step,
            last_step=last_step,
            sequence_length=length,
            training=training,
            validation=validation,
            folders=data.folders,
            order=data.order,
        )
        needed = result.consumed_samples(last_step)
        if data.size is not None and needed > data.size:
            self.notes.append(
                f"data stage {stage.name!r} takes {needed:,} samples of {length:,} tokens, and its "
                f"data have {data.size:,}: they are read {needed / data.size:.1f} times"
            )
        if validation is not None and data.validation_size is not None:
            needed, there = validation.samples_per_step, data.validation_size
            if needed > there:
                self.notes.append(
                    f"data stage {stage.name!r}: a validation takes {needed:,} samples "
                    "(tokens.limit_val_batches x micro_batch_size x dp), and there are "
                    f"{there:,} for it: they are taken {needed / there:.1f} times"
                )
        return result

    def _model_flag(self, name: str) -> bool:
        return bool((self.config.model.model_config or {}).get(name))

    @property
    def _has_validation(self) -> bool:
        tokens = self.config.tokens
        return tokens.val_check_interval > 0 and tokens.limit_val_batches > 0

    def _data(self, stage: DataStage, length: int, before: list[StageBatches]) -> _Data:
        dataset = stage.data.dataset
        if isinstance(dataset, Nanoset):
            return self._nanoset(dataset, stage, length, before)
        if dataset is not None:
            return self._text(dataset, stage, length)
        samples = SyntheticSamples(self.vocab_size, length, stage.data.seed)
        part = Part(samples, _FAR, ENDLESS) if self._has_validation else None
        return _Data(samples, part, None)

    @cached_property
    def _tokenizer(self) -> Any:
        """The run's tokenizer, or None where nothing names one. Raises DataError."""
        section, init = self.config.tokenizer, self.config.model.init_method
        name = section.tokenizer_name_or_path if section else None
        if name is None and isinstance(init, CheckpointInit):
            has_one = (resolve_companions(init.path) / "tokenizer_config.json").is_file()
            name = init.path if has_one else None
        if name is None:
            return None
        loaded = load_tokenizer(name, section.tokenizer_revision if section else None)
        check_vocabulary(loaded, self.vocab_size)
        return loaded

    def _nanoset(
        self, dataset: Nanoset, stage: DataStage, length: int, before: list[StageBatches]
    ) -> _Data:
        if dataset.vocab_size is not None and dataset.vocab_size > self.vocab_size:
            raise DataError(
                f"dataset_folder {', '.join(dataset.dataset_folder)}: its vocab_size is "
                f"{dataset.vocab_size:,}, and the model's is {self.vocab_size:,}"
            )
        tokenizer = self._tokenizer
        has_positions = dataset.return_positions and not dataset.use_old_brrr_dataloader
        folders = tuple(dataset.dataset_folder)
        copies = dataset.dataset_read_path or (None,) * len(folders)
        limits = dataset.dataset_max_tokens or (None,) * len(folders)
        with named(self.config, stage):
            opened = [
                TokenFolder(
                    folder,
                    length,
                    token_size=dataset.token_size_in_bytes,
                    has_positions=has_positions,
                    eos_token_id=tokenizer.eos_token_id if tokenizer is not None else None,
                    shuffle_seed=stage.data.seed if dataset.shuffle_files else None,
                    max_tokens=limit,
                    read_path=copy,
                )
                for folder, copy, limit in zip(folders, copies, limits, strict=True)
            ]
        weights = dataset.dataset_weights or (1.0,) * len(folders)
        order = BlendOrder(weights)
        shares = [weight / sum(weights) for weight in weights]
        training: list[Samples] = list(opened)
        validation: list[Samples] = []
        if self._has_validation:
            parts = [divided(each, each.folder) for each in opened]
            training = [part for part, _ in parts]
            validation = [part for _, part in parts]
        offsets = [_offset(each, length, before) for each in folders]
        return _Data(
            BlendedSamples(training, order, offsets),
            BlendedSamples(validation, order) if validation else None,
            _one_reading(training, shares),
            _one_reading(validation, shares) if validation else None,
            folders=folders,
            order=order,
        )

    def _text(self, dataset: HfDataset | SftDataset, stage: DataStage, length: int) -> _Data:
        splits = dataset.hf_dataset_splits
        names = (splits,) if isinstance(splits, str) else splits
        training = "train" if "train" in names or not names else names[0]
        others = [name for name in names if name != training]
        samples = self._samples(dataset, stage, length, training)
        rest: Samples | None = None
        if self._has_validation and others:
            rest = self._samples(dataset, stage, length, others[0])
        elif self._has_validation:
            samples, rest = divided(samples, _name(dataset.hf_dataset_or_datasets))
        return _Data(
            samples,
            rest,
            len(samples),
            len(rest) if rest is not None else None,
            is_packed=isinstance(dataset, SftDataset),
        )

    def _samples(
        self, dataset: HfDataset | SftDataset, stage: DataStage, length: int, split: str
    ) -> Samples:
        tokenizer = self._tokenizer
        name = _name(dataset.hf_dataset_or_datasets)
        if tokenizer is None:
            raise DataError(
                f"{name}: it is text, which needs a tokenizer: set tokenizer.tokenizer_name_or_path"
            )
        is_chat = isinstance(dataset, SftDataset)
        with named(self.config, stage):
            source = open_source(
                dataset.hf_dataset_or_datasets,
                column=None if isinstance(dataset, SftDataset) else dataset.text_column_name,
                split=split,
                config_name=dataset.hf_dataset_config_name,
                processes=dataset.dataset_processing_num_proc_per_process,
            )
        text = cached_tokens(
            source,
            ChatRecipe.of(tokenizer) if is_chat else TextRecipe(recipe(tokenizer)),
            recipe_identity=ChatRecipe.identity(tokenizer) if is_chat else fingerprint(tokenizer),
            token_size=token_size(vocabulary(tokenizer)),
            workers=dataset.dataset_processing_num_proc_per_process,
            overwrite=dataset.dataset_overwrite_cache and self.is_first_rank,
            on_progress=self.on_progress,
        )
        if not isinstance(dataset, SftDataset):
            apart = self._model_flag("_use_doc_masking")
            return TextWindows(text, length, has_positions=apart)
        fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        packed = PackedConversations(
            text,
            length,
            pad_token_id=next(each for each in fillers if each is not None),
            max_conversations=dataset.debug_max_samples,
        )
        if packed.num_left_out:
            self.notes.append(
                f"{name}: {packed.num_left_out:,} conversations have no answer within "
                f"{length + 1:,} tokens, and are left out"
            )
        return packed


def _name(given: str | tuple[str, ...] | Mapping[str, float]) -> str:
    return given if isinstance(given, str) else ", ".join(given)


def _one_reading(sources: Sequence[Samples], shares: Sequence[float]) -> int:
    """Samples of a blend until the first of its sources is at its end."""
    return min(int(len(each) / share) for each, share in zip(sources, shares, strict=True) if share)


def _offset(folder: str, length: int, before: list[StageBatches]) -> int:
    """Samples at the beginning of a folder that earlier stages take, in samples of this length."""
    tokens = 0
    for stage in before:
        if stage.order is not None and folder in stage.folders:
            counts = stage.order.taken(stage.consumed_samples(stage.last_step))
            taken = sum(
                count for name, count in zip(stage.folders, counts, strict=True) if name == folder
            )
            tokens += taken * (stage.sequence_length + 1)
    return -(-tokens // (length + 1))
