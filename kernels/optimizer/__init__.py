"""The optimizer step on lists of tensors: accumulation, clipping, AdamW. A file for each.

    accumulate_        main += scale * grad                     (main in fp32), in `accumulate`
    clip_grad_norm_    the total norm, and scaling to it        in `grad_norm`
    adamw_step_        AdamW on fp32 masters, and their copy    in `adamw`

Bytes an element with bf16 (fp32) gradients: accumulate_ 2 (4) read of the gradient, 4 read and 4
written of main; the norm 2 (4); clipping 4 (8), or none; AdamW with a bf16 copy 28 (30). Each is a
launch or two for all tensors of a combination of dtypes, see `multi_tensor`; of DTensors each rank
takes its shards, see `shards`.
"""

from nanotron_fast.kernels.optimizer.accumulate import accumulate_, accumulate_reference_
from nanotron_fast.kernels.optimizer.adamw import adamw_step_
from nanotron_fast.kernels.optimizer.grad_norm import (
    clip_grad_norm_,
    clip_grads_with_norm_,
    get_total_norm,
)

__all__ = [
    "accumulate_",
    "accumulate_reference_",
    "adamw_step_",
    "clip_grad_norm_",
    "clip_grads_with_norm_",
    "get_total_norm",
]
