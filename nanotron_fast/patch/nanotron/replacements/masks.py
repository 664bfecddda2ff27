"""What a sequence mask of Llama's says of a batch, with as few waits for the device as may be."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from nanotron_fast.patch.nanotron.targets import ON_DISABLE, DropInOptions

logger = logging.getLogger(__name__)


def _is_same(held: Tensor | None, version: int, mask: Tensor) -> bool:
    """Whether a mask that is held is this one, unchanged since its version."""
    return (
        held is not None
        and held.data_ptr() == mask.data_ptr()
        and held.device == mask.device
        and held.shape == mask.shape
        and held.stride() == mask.stride()
        and version == mask._version
    )


class _Documents:
    """What a mask says: documents' starts, or nothing where every token counts.

    A look at the mask waits for the device, so the last answer is kept, with the mask itself: as
    long as it is held, nothing else lies at its address.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.version = -1
        self.starts: Tensor | None = None

    def of(self, mask: Tensor) -> Tensor | None:
        """cu_seqlens (batch + 1,) int32 as Nanotron counts them: row by row, by the sums."""
        if mask.is_inference():  # it counts no versions, so that nothing can be kept
            return self._starts(mask)
        if not _is_same(self.mask, self.version, mask):
            self.starts = self._starts(mask)
            self.mask, self.version = mask.detach(), mask._version
        return self.starts

    @staticmethod
    def _starts(mask: Tensor) -> Tensor | None:
        if bool(mask.all()):
            return None
        lengths = mask.sum(-1, dtype=torch.int32)
        return nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))

    def forget(self) -> None:
        self.mask = self.starts = None


class _Assumed:
    """Masks that are taken for all true, looked at when the device has come that far by itself.

    Each new mask's number of False goes to the host in the background. A later call finds it there,
    and says so once if it is not 0: the batch is computed as if it were.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.version = -1
        # The number on the host, the event after its copy, and the mask's number of elements.
        self.pending: tuple[Tensor, torch.cuda.Event | None, int] | None = None
        self.has_warned = False

    def note(self, mask: Tensor) -> None:
        """Begins to look at a mask, if none is being looked at; never waits."""
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            # What is recorded would be looked at once, and replayed with other masks. And to ask
            # an event while a graph is captured ends the capture.
            return
        self._report()
        if self.has_warned or self.pending is not None or mask.is_inference():
            return
        if _is_same(self.mask, self.version, mask):
            return
        event = None
        if mask.is_cuda:
            count = torch.empty((), dtype=torch.int64, pin_memory=True)
            count.copy_(mask.logical_not().sum(), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            count = mask.logical_not().sum()
        self.mask, self.version = mask.detach(), mask._version
        self.pending = (count, event, mask.numel())

    def _report(self) -> None:
        if self.pending is None:
            return
        count, event, total = self.pending
        if event is not None and not event.query():
            return
        self.pending = None
        num_false = int(count.numpy())
        if num_false and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "nanotron_fast: assume_full_masks=True, and %d of the %d elements of a sequence "
                "mask are False: their tokens were attended to as all others were",
                num_false,
                total,
            )

    def forget(self) -> None:
        self._report()
        self.mask = self.pending = None
        self.has_warned = False


_documents, _assumed = _Documents(), _Assumed()
ON_DISABLE.extend([_documents.forget, _assumed.forget])


def document_starts(mask: Tensor, options: DropInOptions) -> Tensor | None:
    """Where the documents of a batch start, as Nanotron counts them; None where all is full.

    Args:
        mask: (batch, seq), bool, True where a token counts.
        options: with `assume_full_masks` the answer is None, and nothing waits for the device.

    Returns:
        (batch + 1,) int32 on the mask's device, or None.
    """
    if options.assume_full_masks:
        _assumed.note(mask)
        return None
    return _documents.of(mask)
