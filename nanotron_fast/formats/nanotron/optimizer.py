"""The files of the states of training in a checkpoint: their names, and who has what of them.

A rank's file of the optimizer holds `state`, a group of constants for each parameter, `names`, and
under `gradient_accumulator` the fp32 masters. With ZeRO-0 the first data-parallel rank writes whole
shards, with ZeRO-1 every rank its runs; a parameter of which a rank has no element is in its
`param_groups` alone. Source: serialize/optimizer.py, serialize/random.py and optim/zero.py in
nanotron at 2411b022, and what a run of it has left.

Experts may be split over `ep` ranks, which lie inside data parallelism: the rank `dp` of it has
the experts of the rank `dp % ep`, and a shard of experts is cut into runs over the `dp // ep` ranks
that have the same. With ZeRO-0 the file of the first expert rank has what is not split as well, and
those of the others have their experts alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron.checkpoint import METADATA, OPTIMIZER, STALE, NanotronCheckpoint

LR_SCHEDULER, RANDOM = "lr_scheduler", "random"
OPTIMIZER_CONFIG = "optimizer_config.json"
MASTERS = "gradient_accumulator"
ZERO, PLAIN = "ZeroDistributedOptimizer", "OptimizerFromGradientAccumulator"

# More ranks than anybody has along one axis.
MAX_RANKS = 1 << 16
_OF_RANK = (
    r"_pp-(?P<pp>\d{1,9})-of-(?P<pps>\d{1,9})(_dp-(?P<dp>\d{1,9})-of-(?P<dps>\d{1,9}))?"
    r"_tp-(?P<tp>\d{1,9})-of-(?P<tps>\d{1,9})_exp-(?P<exp>\d{1,9})-of-(?P<exps>\d{1,9})\.pt"
)
# The first element of a rank's share of a flattened shard, and the one behind its last.
Run = tuple[int, int]


def runs_of(num_elements: int, dp: int) -> list[Run]:
    """The first element of each data-parallel rank's run, and the one behind its last.

    Nanotron's slices: a flattened parameter of n elements is cut into runs of ceil(n / dp), of
    which the last ceil(n / dp) * dp - n ranks have one element less.
    """
    return list(_runs_of(num_elements, dp))


@lru_cache(maxsize=1024)
def _runs_of(num_elements: int, dp: int) -> tuple[Run, ...]:
    longest = -(-num_elements // dp)
    num_shorter = longest * dp - num_elements
    runs, start = [], 0
    for rank in range(dp):
        end = start + longest - (rank >= dp - num_shorter)
        runs.append((start, end))
        start = end
    return tuple(runs)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """The ranks that a file is of; dp is None for all of them that have the same experts, `ep`."""

    pp: int
    tp: int
    dp: int | None
    ep: int = 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """The groups of ranks that wrote states.

    Attributes:
        dp: data-parallel ranks; a multiple of `ep`.
        zero_stage: 0, or 1 for runs of each rank.
        ep: ranks that experts are split over.
    """

    tp: int
    pp: int
    dp: int
    zero_stage: int = 0
    ep: int = 1

    def __str__(self) -> str:
        ep = f" ep={self.ep}" if self.ep > 1 else ""
        return f"tp={self.tp} pp={self.pp} dp={self.dp}{ep} with zero_stage={self.zero_stage}"

    @property
    def axes(self) -> dict[str, int]:
        """The axes that cut parameters, as `Param` takes them."""
        return {"tp": self.tp, "ep": self.ep}

    def places(self) -> Iterable[Place]:
        """Of every file of the optimizer."""
        for pp in range(self.pp):
            for tp in range(self.tp):
                if self.zero_stage:
                    yield from (Place(pp, tp, dp, dp % self.ep) for dp in range(self.dp))
                else:
                    yield from (Place(pp, tp, None, ep) for ep in range(self.ep))

    def rate_places(self) -> Iterable[Place]:
        """Of every file of the learning rate."""
        return replace(self, zero_stage=0).places()

    def runs(self, num_elements: int, *, is_split: bool) -> list[Run]:
        """The run of each data-parallel rank in its flattened shard of so many elements.

        `is_split` says that the shard is one of experts that are split over ranks: those that have
        the same experts share it out among themselves.
        """
        ranks_each = self.ep if is_split else 1
        runs = runs_of(num_elements, self.dp // ranks_each)
        return [runs[rank // ranks_each] for rank in range(self.dp)]


@dataclass(frozen=True, slots=True)
class Described:
    """What `optimizer_config.json` says of a parameter: the runs and the shape of its shard.

    Each data-parallel rank has its run in the shard that is its own. Of experts that are split over
    ranks there are several shards of the same shape, so that ranks have the same runs of different
    ones: that of the rank `dp` is the shard of the expert rank `dp % ep`.
    """

    name: str
    runs: tuple[Run, ...]
    shape: tuple[int, ...]


def optimizer_path(place: Place, sizes: Sizes) -> str:
    """The file of a rank's optimizer, relative to the checkpoint."""
    dp = "" if place.dp is None else f"_dp-{place.dp}-of-{sizes.dp}"
    ranks = f"{_pp(place, sizes)}{dp}{_tp(place, sizes)}{_exp(place, sizes)}"
    return f"{OPTIMIZER}/optimizer{ranks}.pt"


def lr_scheduler_path(place: Place, sizes: Sizes) -> str:
    """The file of a rank's learning rate, relative to the checkpoint.

    All ranks of dp that have the same experts share it. It has a rate for each of `param_groups`
    in their files of the optimizer.
    """
    ranks = f"{_pp(place, sizes)}{_tp(place, sizes)}{_exp(place, sizes)}"
    return f"{LR_SCHEDULER}/lr_scheduler{ranks}.pt"


def random_path(pp: int, dp: int, tp: int, sizes: Sizes) -> str:
    """The file of a rank's random states, relative to the checkpoint."""
    return f"{RANDOM}/tp-{tp}-of-{sizes.tp}_dp-{dp}-of-{sizes.dp}_pp-{pp}-of-{sizes.pp}.pt"


def _pp(place: Place, sizes: Sizes) -> str:
    return f"_pp-{place.pp}-of-{sizes.pp}"


def _tp(place: Place, sizes: Sizes) -> str:
    return f"_tp-{place.tp}-of-{sizes.tp}"


def _exp(place: Place, sizes: Sizes) -> str:
    return f"_exp-{place.ep}-of-{sizes.ep}"


def config_document(
    described: Sequence[Described], sizes: Sizes, *, kind: str | None = None
) -> dict[str, Any]:
    """`optimizer_config.json`, of the parameters of all pipeline stages; numbers are text in it.

    `kind` is the optimizer's class without ZeRO, by default that with fp32 masters.
    """
    configs: dict[str, Any] = {}
    if sizes.zero_stage > 0:
        configs = {
            "param_name_to_dp_rank_offsets": {
                each.name: {
                    str(rank): [str(first), str(end)]
                    for rank, (first, end) in enumerate(each.runs)
                    if first < end
                }
                for each in described
            },
            "orig_param_shapes": {each.name: [str(n) for n in each.shape] for each in described},
        }
    return {
        "type": ZERO if sizes.zero_stage > 0 else kind or PLAIN,
        "parallelism": {
            "tp_size": str(sizes.tp),
            "dp_size": str(sizes.dp),
            "pp_size": str(sizes.pp),
            "expert_parallel_size": str(sizes.ep),
        },
        "configs": configs,
    }


@dataclass(frozen=True, slots=True)
class Found:
    """The files of the states in a checkpoint, by their names and configurations alone.

    Attributes:
        files: of the optimizer.
        sizes: of the groups that wrote them.
        rates: the files of the learning rate; there may be none.
        config: `optimizer_config.json`, empty where it is missing.
    """

    files: Mapping[Place, Path]
    sizes: Sizes
    rates: Mapping[Place, Path]
    config: Mapping[str, Any]


def find_states(folder: Path) -> Found:
    """The states in a checkpoint, which may lie there beside those of another topology.

    Raises CheckpointError, which names the files and what to do, where there are none, some are
    missing, or they contradict each other, `optimizer_config.json` or `checkpoint_metadata.json`;
    OSError.
    """
    files, sizes = found_files(folder)
    path = folder / OPTIMIZER / OPTIMIZER_CONFIG
    config = read_json_object(path) if path.is_file() else {}
    described = _described_by(config, path)
    if described is not None:
        same_dp = described.dp == sizes.dp or not sizes.zero_stage
        if replace(described, dp=0) != replace(sizes, dp=0) or not same_dp:
            raise CheckpointError(
                f"{path}: it speaks of {described}, and the files beside it are of {sizes}. {STALE}"
            )
        sizes = described
    metadata = folder / METADATA
    document = read_json_object(metadata) if metadata.is_file() else {}
    for axis, size in (("tp", sizes.tp), ("dp", sizes.dp)):
        told = document.get(axis)
        # Without ZeRO and its configuration nothing says how many data-parallel ranks there were.
        is_known = axis == "tp" or described is not None or sizes.zero_stage
        if isinstance(told, int) and is_known and told != size:
            raise CheckpointError(
                f"{metadata}: it says {axis}={told}, and the files in {folder / OPTIMIZER} are of "
                f"{sizes}. {STALE}"
            )
        if axis == "dp" and isinstance(told, int) and 0 < told <= MAX_RANKS and not is_known:
            sizes = replace(sizes, dp=told)
    rates: Mapping[Place, Path] = {}
    # The released 0.4 has one file for all ranks, without their numbers.
    if any((folder / LR_SCHEDULER).glob(f"{LR_SCHEDULER}_*.pt")):
        rates, of_rates = found_files(folder, LR_SCHEDULER)
        if (of_rates.tp, of_rates.pp, of_rates.ep) != (sizes.tp, sizes.pp, sizes.ep):
            ep = f" ep={of_rates.ep}" if max(of_rates.ep, sizes.ep) > 1 else ""
            raise CheckpointError(
                f"{folder / LR_SCHEDULER}: its files are of tp={of_rates.tp} pp={of_rates.pp}{ep}, "
                f"and those in {folder / OPTIMIZER} of {sizes}. {STALE}"
            )
    if sizes.dp % sizes.ep:
        raise CheckpointError(
            f"{folder / OPTIMIZER}: ep={sizes.ep} does not divide dp={sizes.dp}, inside of which "
            "experts are split over ranks"
        )
    return Found(files, sizes, rates, config)


def check_beside_weights(found: Found, weights: NanotronCheckpoint) -> None:
    """Raises CheckpointError where states are of other ranks than the weights beside them."""
    sizes = found.sizes
    has_other = weights.sharded and (sizes.tp, sizes.pp) != (weights.tp, weights.pp)
    if has_other or sizes.ep != weights.ep:
        ep = f" ep={weights.ep}" if max(weights.ep, sizes.ep) > 1 else ""
        raise CheckpointError(
            f"{weights.root / OPTIMIZER}: its files are of {sizes}, and the weights of "
            f"tp={weights.tp} pp={weights.pp}{ep}. {STALE}"
        )


def found_files(folder: Path, what: str = OPTIMIZER) -> tuple[dict[Place, Path], Sizes]:
    """The files of a checkpoint's states, and the sizes of the groups that wrote them.

    Args:
        folder: of the checkpoint.
        what: OPTIMIZER or LR_SCHEDULER, which is also the folder that they are in.

    Raises CheckpointError where there are none, some are missing, or two topologies are mixed.
    """
    pattern = re.compile(re.escape(what) + _OF_RANK)
    files: dict[Place, Path] = {}
    by_sizes: dict[tuple[int, int, int | None, int], Path] = {}
    for path in sorted((folder / what).glob(f"{what}_*.pt")):
        match = pattern.fullmatch(path.name)
        if match is None:
            raise CheckpointError(f"{path}: not a name that Nanotron gives to a rank's {what}")
        dp, dps = (None if match[key] is None else int(match[key]) for key in ("dp", "dps"))
        pps, tps, eps = int(match["pps"]), int(match["tps"]), int(match["exps"])
        place = Place(int(match["pp"]), int(match["tp"]), dp, int(match["exp"]))
        if place.pp >= pps or place.tp >= tps or (dp or 0) >= (dps or 1) or place.ep >= eps:
            raise CheckpointError(f"{path}: there is no such rank among so many")
        if dp is not None and dp % eps != place.ep:
            raise CheckpointError(
                f"{path}: the data-parallel rank {dp} has the experts of rank {dp % eps} of {eps}, "
                f"and the name speaks of rank {place.ep}"
            )
        files[place] = path
        by_sizes.setdefault((pps, tps, dps, eps), path)
    if not files:
        raise CheckpointError(
            f"{folder / what}: there are no states of an optimizer in it; "
            "checkpoints.load_optimizer=false goes on without them, and model.init_method.path "
            "begins a new run with the weights"
        )
    if len(by_sizes) > 1:
        told = ", ".join(f"{_told(*each)} ({path.name})" for each, path in by_sizes.items())
        raise CheckpointError(
            f"{folder / what}: files of {len(by_sizes)} topologies are mixed: {told}. {STALE}"
        )
    ((pp, tp, dps, ep),) = by_sizes
    # Without ZeRO there are at least as many data-parallel ranks as experts are split over.
    sizes = Sizes(tp, pp, dps or ep, zero_stage=0 if dps is None else 1, ep=ep)
    expected = pp * tp * (dps or ep)
    if len(files) != expected:
        told = _told(pp, tp, dps, ep)
        raise CheckpointError(
            f"{folder / what}: {len(files)} files of {told}, which has {expected}; some are missing"
        )
    return files, sizes


def _told(pp: int, tp: int, dp: int | None, ep: int) -> str:
    return f"tp={tp} pp={pp}{f' dp={dp}' if dp else ''}{f' ep={ep}' if ep > 1 else ''}"


def _described_by(document: Mapping[str, Any], where: Path) -> Sizes | None:
    """The sizes that an `optimizer_config.json` speaks of; None where it does not say."""
    parallelism = document.get("parallelism")
    if parallelism is None:
        return None
    try:
        tp, pp, dp = (int(parallelism[f"{axis}_size"]) for axis in ("tp", "pp", "dp"))
        ep = int(parallelism.get("expert_parallel_size", 1))
        kind = document["type"]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        found = f"type is {document.get('type')!r}, parallelism is {parallelism!r}"
        raise CheckpointError(
            f"{where}: it should have type, and parallelism with tp_size, pp_size and dp_size, "
            f"each a number: {found[:200]}"
        ) from None
    if not all(0 < size <= MAX_RANKS for size in (tp, pp, dp, ep)):
        told = f"tp={tp} pp={pp} dp={dp} ep={ep}"
        raise CheckpointError(f"{where}: {told[:200]} is no number of ranks")
    return Sizes(tp, pp, dp, zero_stage=int(kind == ZERO), ep=ep)
