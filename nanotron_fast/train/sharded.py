"""ZeRO-3: every data-parallel rank keeps some rows of each parameter, by torch's fully_shard.

A layer's parameters are gathered when it computes and let go afterwards, and its gradients are
summed and scattered as soon as a micro-batch's backward has left it: nothing that is as large as
the model stays on a rank. What it keeps are fp32 masters, their gradients and the optimizer's
states; products see them rounded to the model's dtype. What the stage has beside its layers
(embedding, final norm, head) is gathered together. Gradients come as `grad`: there is no
`main_grad`. Experts that are split over ranks are shared out among the ranks that have the same
ones.

The run of rank r of a parameter with n rows begins at row r * ceil(n / dp). Files have Nanotron's
runs of ZeRO-1, which are the same where n divides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from nanotron_fast.formats.nanotron.optimizer import Run
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.models.experts import MergedExperts
from nanotron_fast.train.mesh import Mesh


def runs_of_rows(shape: Sequence[int], dp: int) -> list[Run]:
    """The elements of a flattened parameter that each of `dp` ranks has.

    Source: torch.chunk, whose chunks fully_shard keeps.
    """
    rows, width = shape[0], math.prod(shape[1:])
    longest = -(-rows // dp)
    edges = [min(rank * longest, rows) * width for rank in range(dp + 1)]
    return list(itertools.pairwise(edges))


@torch.no_grad()
def shard(decoder: Decoder, mesh: Mesh, *, whole: Collection[str]) -> None:
    """Shares a decoder's parameters out among data-parallel ranks, each of which has them all.

    They are in fp32 from here on; what is computed with is in the dtype that they had. One layer is
    whole on the rank's device at a time: where the model is too large for that, it may be given on
    the CPU.

    Args:
        whole: the names of parameters that are left as they are, on every rank.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert mesh.device_mesh is not None
    left = {tensor for name, tensor in decoder.named_parameters() if name in whole}
    (dtype,) = {tensor.dtype for tensor in decoder.parameters() if tensor not in left}
    among_all = mesh.device_mesh["dp"]
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "ignored_params": left,
    }
    modules: list[nn.Module] = []
    for layer in decoder.layers:
        _prepare(layer.parameters(), left, mesh.device)
        if mesh.expert_mesh is not None and mesh.edp > 1:
            for experts in layer.modules():
                if isinstance(experts, MergedExperts):
                    among = mesh.expert_mesh["edp"]
                    modules.append(
                        fully_shard(experts, mesh=among, reshard_after_forward=True, **options)
                    )
        modules.append(fully_shard(layer, mesh=among_all, reshard_after_forward=True, **options))
    inside = {tensor for layer in decoder.layers for tensor in layer.parameters()}
    beside = (tensor for tensor in decoder.parameters() if tensor not in inside)
    _prepare(beside, left, mesh.device)
    modules.append(fully_shard(decoder, mesh=among_all, **options))
    for module in modules:
        _sum_gradients(module)


def _prepare(
    parameters: Iterable[nn.Parameter], left: set[nn.Parameter], device: torch.device
) -> None:
    for parameter in parameters:
        dtype = parameter.dtype if parameter in left else torch.float32
        parameter.data = parameter.data.to(device, dtype)


def _sum_gradients(module: nn.Module) -> None:
    """Sums, no means, as everywhere here; in one pass, which gloo can do as well."""
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(module, FSDPModule)
    module.set_force_sum_reduction_for_comms(True)
    module.set_gradient_divide_factor(1.0)
