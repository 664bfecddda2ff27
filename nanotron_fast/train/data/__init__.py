"""What a model is trained on: a batch is a function of the step and of the data-parallel rank.

`batches_of` builds it from a configuration. A source of samples is anything with a length and
`samples[i]`; none of them keeps a state, so a run that is resumed, at whatever data-parallel size,
goes on where it was.
"""

from nanotron_fast.train.data.batches import Batches, MicroBatch
from nanotron_fast.train.data.samples import Sample, Samples
from nanotron_fast.train.data.stages import Consumed, StagedBatches, batches_of

__all__ = ["Batches", "Consumed", "MicroBatch", "Sample", "Samples", "StagedBatches", "batches_of"]
