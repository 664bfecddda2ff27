"""Random weights by Nanotron's rules, the same whole tensors at every topology.

    embedding, head, column, router: normal(0, std)      norm: 1      bias: 0
    what a family's table has a number for: that
    row: normal(0, std / sqrt(2 * layers)), or std where rows are not scaled
    spectral muP (arXiv:2310.17813): embedding normal(0, 1); every other matrix
    normal(0, sqrt(1 / fan_in) * min(1, sqrt(fan_out / fan_in))), fans of the whole matrix

Source: nanotron/scaling/parametrization.py at 2411b022. Nanotron seeds each rank by
seed + tp_rank, so its weights depend on the topology. Here every row of a parameter that is split
by rows, every column of one that is split by columns, and every expert has numbers of its own,
drawn from the seed, the parameter's name and the place in the whole: a run starts from the same
weights at any TP, PP and EP, on any device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nanotron_fast.families.parts import Sizes
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.models.facts import Facts, facts_of


@torch.no_grad()
def initialize(
    decoder: Decoder,
    *,
    tp_rank: int = 0,
    ep_rank: int = 0,
    seed: int = 42,
    std: float | None = None,
    scales_rows: bool = True,
    is_mup: bool = False,
) -> None:
    """Fills every parameter of a decoder in place, from numbers drawn on the CPU in fp32.

    Args:
        decoder: its parameters are on a device.
        tp_rank, ep_rank: whose shards they are.
        seed: of all numbers.
        std: of matrices; the architecture's initializer_range by default. Not with muP.
        scales_rows: Nanotron's scaling_method NUM_LAYERS.
        is_mup: Nanotron's use_mup.
    """
    spec = decoder.architecture.spec
    base = spec.initializer_range if std is None else std
    row = base / math.sqrt(2 * spec.num_layers) if scales_rows else base
    parameters = dict(decoder.named_parameters())
    sizes, ranks = decoder.topology.sizes, {"tp": tp_rank, "ep": ep_rank}
    for name, facts in facts_of(decoder).items():
        parameter = parameters[name]
        if facts.param.initial is not None:
            parameter.fill_(facts.param.initial)
            continue
        if facts.role in ("norm", "bias"):
            is_one = facts.role == "norm" and not spec.norm_adds_one
            parameter.fill_(1.0 if is_one else 0.0)
            continue
        deviation = row if facts.role == "row" else base
        drawn = _drawn(facts, seed, sizes, ranks)
        parameter.copy_(drawn.mul_(_mup_std(facts) if is_mup else deviation))


def mup_learning_rate_factor(facts: Facts) -> float:
    """What muP multiplies a parameter's learning rate by: fan_out / fan_in of a matrix, else 1."""
    if facts.role in ("embedding", "norm", "bias"):
        return 1.0
    fan_in, fan_out = _fans(facts)
    return fan_out / fan_in


def _fans(facts: Facts) -> tuple[int, int]:
    """Of the whole matrix, of one expert's where there are several: those lie (in, out)."""
    shape = facts.whole_shape
    return (shape[1], shape[0]) if len(shape) == 2 else (shape[-2], shape[-1])


def _mup_std(facts: Facts) -> float:
    if facts.role == "embedding":
        return 1.0
    fan_in, fan_out = _fans(facts)
    return math.sqrt(1 / fan_in) * min(1.0, math.sqrt(fan_out / fan_in))


def _drawn(facts: Facts, seed: int, sizes: Sizes, ranks: Sizes) -> Tensor:
    """This rank's shard of normal(0, 1), fp32 on the CPU."""
    name = facts.stored_name  # both copies of a tied matrix are one
    generator = torch.Generator()
    if not facts.param.cuts:
        generator.manual_seed(_seed(seed, name))
        return torch.randn(facts.whole_shape, generator=generator)
    ((axis, dim),) = facts.param.cuts.items()
    shape = facts.param.local_shape(sizes)
    others = [length for each, length in enumerate(shape) if each != dim]
    lines = torch.empty(shape[dim], *others)
    places = _places(facts, axis, ranks[axis], sizes[axis])
    for line, place in zip(lines, places, strict=True):  # copies are alike
        generator.manual_seed(_seed(seed, name, place))
        line.normal_(generator=generator)
    return lines.movedim(0, dim)


def _places(facts: Facts, axis: str, rank: int, size: int) -> Iterator[int]:
    """Of each of a shard's rows (or columns, or experts) in the whole: every chunk is split by
    itself."""
    if axis == "tp":
        for span in facts.param.spans(size, rank):
            yield from range(span.whole, span.whole + span.length)
        return
    share = facts.whole_shape[facts.param.cuts[axis]] // size
    yield from range(rank * share, (rank + 1) * share)


def _seed(*of: object) -> int:
    text = "\0".join(map(str, of)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
