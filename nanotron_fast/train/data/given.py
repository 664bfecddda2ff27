"""A user's own batches in place of a configuration's data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.batches import MicroBatch

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
    """

    def __init__(self, batches: Iterable[Any], *, rows: int, dp: int, vocab_size: int) -> None:
        self._batches: Iterator[Any] = iter(batches)
        self._rows, self._dp, self._vocab_size = rows, dp, vocab_size
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
            tensors = {name: torch.as_tensor(each) for name, each in given.items()}
        else:
            tokens = torch.as_tensor(given)
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
        where = f"{name} of the batch of step {step}"
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype.itemsize < 2:
            raise DataError(f"{where} is {tensor.dtype}, and should be integers")
        if tuple(tensor.shape) != shape or len(shape) != 2 or shape[0] != self._rows:
            raise DataError(
                f"{where} has the shape {tuple(tensor.shape)}: it should be "
                f"({self._rows}, length), micro_batch_size x batch_accumulation_per_replica rows"
            )
        least, most = int(tensor.min()), int(tensor.max())
        lowest = -100 if name == "labels" else 0
        if least < lowest or (name != "position_ids" and most >= self._vocab_size):
            raise DataError(
                f"{where} has the token {least if least < lowest else most}, which is not in the "
                f"model's vocabulary of {self._vocab_size}"
            )
