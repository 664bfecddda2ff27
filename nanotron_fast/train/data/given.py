"""A user's own batches in place of a configuration's data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.batches import NO_LABEL, MicroBatch

if TYPE_CHECKING:
    import torch


class GivenBatches:
    """Batches of an iterable, one for each step, in the order of the steps.

    Args:
        batches: each is this data-parallel rank's part of a global batch, of as many rows as the
            configuration says: int64 tokens (rows, length + 1), of which each is the label of the
            one before it; or a mapping with `input_ids` (rows, length), `labels` of the same shape
            (the token after each; -100 where no loss is taken) and, where rows hold several
            documents, `position_ids`.
            The first is that of step 1; a run that is resumed passes over those that it has taken.
        rows: of a batch.
        dp: data-parallel ranks, each of which is given its own.
        vocab_size: token ids lie below it.
        max_length: the model's positions, which no row may exceed; None for any length.
        has_validation: the configuration asks for validation, which these batches have none of.

    Attributes:
        notes: what a user may want to know about the data, each a sentence.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        rows: int,
        dp: int,
        vocab_size: int,
        max_length: int | None = None,
        has_validation: bool = False,
    ) -> None:
        self._batches: Iterator[Any] = iter(batches)
        self._rows, self._dp, self._vocab_size = rows, dp, vocab_size
        self._max_length = max_length
        self.notes: tuple[str, ...] = ()
        if has_validation:
            self.notes = (
                "there is no validation: tokens.val_check_interval and limit_val_batches hold "
                "samples out of data_stages, and this run is given its batches",
            )
        self._length = 0
        # Of all ranks, once so many steps are done.
        self._tokens = [0]

    def batch(self, step: int) -> list[MicroBatch]:
        """The batch of a step, the next one or a later one. Raises DataError."""
        if step < len(self._tokens):
            raise ValueError(f"the batch of step {step} was taken before")
        while True:
            number = len(self._tokens)
            try:
                given = next(self._batches)
            except StopIteration:
                raise DataError(
                    f"the batches that were given end after {number - 1}, and step {step} needs "
                    "one: give as many as there are steps, or lower tokens.train_steps"
                ) from None
            micro_batch = self._checked(given, number)
            self._length = micro_batch.input_ids.shape[1]
            self._tokens.append(self._tokens[-1] + self._rows * self._length * self._dp)
            if number == step:
                return [micro_batch]

    def validation(self, step: int) -> list[MicroBatch]:
        """None: there is nothing to hold out from."""
        return []

    def consumed(self, step: int) -> list[dict[str, Any]]:
        """What was taken once a step is done, as one data stage."""
        return [
            {
                "name": "given",
                "sequence_length": self._length,
                "start_training_step": 1,
                "consumed_train_samples": self._rows * self._dp * step,
                "consumed_tokens_per_dataset_folder": {},
            }
        ]

    def tokens(self, step: int) -> int:
        """Tokens of all ranks that were taken once a step is done."""
        return self._tokens[min(step, len(self._tokens) - 1)]

    def _checked(self, given: Any, step: int) -> MicroBatch:
        import torch

        if isinstance(given, Mapping):
            unknown = sorted(set(given) - {"input_ids", "labels", "position_ids"})
            missing = [name for name in ("input_ids", "labels") if name not in given]
            if unknown or missing:
                raise DataError(
                    f"the batch of step {step} has the keys {sorted(map(str, given))}: it should "
                    "have input_ids, labels and perhaps position_ids"
                )
            tensors = {name: _tensor(each, step) for name, each in given.items()}
        else:
            tokens = _tensor(given, step)
            if tokens.ndim != 2 or tokens.shape[1] < 2:
                raise DataError(
                    f"the batch of step {step} has the shape {tuple(tokens.shape)}: tokens are "
                    "(rows, length + 1)"
                )
            tensors = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
        shape = tuple(tensors["input_ids"].shape)
        for name, tensor in tensors.items():
            self._check(name, tensor, shape, step)
        ready = {name: each.to("cpu", torch.int64).contiguous() for name, each in tensors.items()}
        return MicroBatch(**ready)

    def _check(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], step: int) -> None:
        import torch

        where = f"{name} of the batch of step {step}"
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype.itemsize < 2:
            raise DataError(f"{where} is {tensor.dtype}, and should be integers")
        if tuple(tensor.shape) != shape or len(shape) != 2 or shape[0] != self._rows:
            raise DataError(
                f"{where} has the shape {tuple(tensor.shape)}: it should be "
                f"({self._rows}, length), micro_batch_size x batch_accumulation_per_replica rows"
            )
        limit = self._max_length
        if shape[1] < 1 or (limit is not None and shape[1] > limit):
            raise DataError(
                f"{where} has the length {shape[1]}, and the model has {limit} positions "
                "(model.model_config: max_position_embeddings, rope_scaling)"
                if shape[1]
                else f"{where} has no tokens"
            )
        numbers = tensor.to("cpu", torch.int64)
        if name == "labels":
            numbers = numbers[numbers != NO_LABEL]
        if not numbers.numel():
            return
        is_position = name == "position_ids"
        bound = limit if is_position else self._vocab_size
        least, most = int(numbers.min()), int(numbers.max())
        if least < 0 or (bound is not None and most >= bound):
            found = least if least < 0 else most
            raise DataError(
                f"{where} has the position {found}, and those of the model are from 0 on"
                + (f", below {bound}" if bound is not None else "")
                if is_position
                else f"{where} has the token {found}, which is not in the model's vocabulary of "
                f"{bound}" + (f"; {NO_LABEL} marks no label" if name == "labels" else "")
            )


def _tensor(given: Any, step: int) -> torch.Tensor:
    """A tensor of what was given, a sequence of tensors stacked. Raises DataError."""
    import torch

    try:
        if isinstance(given, list | tuple) and given and isinstance(given[0], torch.Tensor):
            return torch.stack(tuple(given))
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the batch of step {step} cannot be made a tensor, from a {type(given).__name__}: a "
            "batch is integer tokens (rows, length + 1), or a mapping with input_ids, labels and "
            f"perhaps position_ids, each (rows, length): {error}"
        ) from error
