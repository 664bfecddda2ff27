"""Nanotron's layout: one safetensors file for each tensor and rank, its name made of folders."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError, PartialCheckpointError
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.patterns import matching
from nanotron_fast.formats.plain_file import read_small
from nanotron_fast.formats.safetensors import Header, TensorInfo, build_header, read_header
from nanotron_fast.model.ranks import Ranks
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.files import ReadFile

MODEL_CONFIG = "model_config.json"
METADATA = "checkpoint_metadata.json"
CONFIG_YAML = "config.yaml"
LATEST = "latest.txt"
WEIGHTS = "model"
# The folder of the optimizer's states.
OPTIMIZER = "optimizer"
TENSOR = "data"
# What to do where files are mixed, which Nanotron would merge in silence.
STALE = "Remove those of the topology that did not write this checkpoint"

_FILE_NAME = re.compile(
    r"model_(?P<leaf>[A-Za-z0-9_]+?)"
    r"(?:_pp-rank-(?P<pp_rank>\d+)-of-(?P<pp>\d+)_tp-rank-(?P<tp_rank>\d+)-of-(?P<tp>\d+)"
    r"(?:_exp-rank-(?P<ep_rank>\d+)-of-(?P<ep>\d+))?)?\.safetensors"
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: a rank's share of a parameter, or all of a replicated one."""

    path: Path
    info: TensorInfo
    metadata: Mapping[str, str]
    tp_rank: int
    pp_rank: int
    ep_rank: int = 0


@dataclass(frozen=True, slots=True)
class NanotronCheckpoint:
    """What is in a directory, from its headers."""

    root: Path
    model_config: dict[str, Any]
    # Shards in order of TP rank, or of EP rank; a replicated parameter has one, and is not in
    # `sharded`.
    params: dict[str, tuple[Shard, ...]]
    sharded: frozenset[str]
    tp: int
    pp: int
    # The ranks whose files are there, where it is not those of all; None where there are all. A
    # stage may have no file of its own, so that one which lacks is no proof that something does.
    there: Ranks | None = None
    # Parameters that were there, and that `without` took out.
    ignored: tuple[str, ...] = ()
    # Over how many ranks experts are split.
    ep: int = 1
    # What each file was when its header was read.
    read: Mapping[Path, ReadFile] = field(default_factory=dict)

    def without(self, patterns: Sequence[str]) -> NanotronCheckpoint:
        """The checkpoint without the parameters whose names match."""
        ignored = matching(self.params, patterns)
        kept = {name: shards for name, shards in self.params.items() if name not in ignored}
        return replace(self, params=kept, ignored=ignored)


def is_nanotron_checkpoint(root: Path) -> bool:
    """Whether a directory looks like one."""
    return (root / MODEL_CONFIG).is_file() or (root / WEIGHTS / WEIGHTS).is_dir()


def resolve_latest(root: Path) -> Path:
    """The step that `latest.txt` points to, where a directory of training steps is given."""
    latest = root / LATEST
    if is_nanotron_checkpoint(root) or not latest.is_file():
        return root
    # A training that goes on writes it anew.
    step = read_small(latest, is_noted=False).decode("utf-8", errors="replace").strip()
    # No name is longer; a longer one would make this message as long as the file.
    if not step.isdecimal() or len(step) > 255 or not (root / step).is_dir():
        raise CheckpointError(
            f"{latest}: it points to {step[:80]!r}, which is not a step beside it"
        )
    return root / step


def tensor_path(
    param: str,
    shard: tuple[int, int, int, int] | None,
    expert: tuple[int, int] | None = None,
) -> str:
    """A parameter's file, relative to the root.

    `shard` is (pp_rank, pp, tp_rank, tp) or None; `expert` (ep_rank, ep) where experts are split
    over ranks: every tensor-parallel rank reads the files of rank 0 then.
    """
    *folders, leaf = param.split(".")
    suffix = ""
    if shard is not None:
        pp_rank, pp, tp_rank, tp = shard
        suffix = f"_pp-rank-{pp_rank}-of-{pp}_tp-rank-{tp_rank}-of-{tp}"
    if expert is not None:
        suffix += f"_exp-rank-{expert[0]}-of-{expert[1]}"
    return "/".join((WEIGHTS, *folders, f"model_{leaf}{suffix}.safetensors"))


def tensor_header(
    dtype: Dtype, shape: tuple[int, ...], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """A file's header and where its data starts."""
    header, offsets = build_header([(TENSOR, dtype, shape)], metadata)
    return header, offsets[TENSOR]


def read_nanotron(root: Path, *, takes_part: bool = False) -> NanotronCheckpoint:
    """Reads the configuration and every header. Raises CheckpointError, OSError.

    With `takes_part`, some tensor-parallel ranks' files may be there alone: the same ranks' of
    every parameter that is split, as `--ranks-only` writes them.
    """
    if not (root / MODEL_CONFIG).is_file():
        raise CheckpointError(
            f"{root}: no {MODEL_CONFIG}, which Nanotron writes beside the weights"
        )
    model_config = read_json_object(root / MODEL_CONFIG)
    if not (root / WEIGHTS).is_dir():
        raise CheckpointError(f"{root}: no folder {WEIGHTS}/ with the weights")
    found: dict[str, dict[int | None, Shard]] = {}
    # By the number of ranks, and the parameter.
    experts: dict[int, dict[str, dict[int | None, Shard]]] = {}
    read: dict[Path, ReadFile] = {}
    sizes: dict[tuple[int, int], Path] = {}
    for path in _tensor_files(root / WEIGHTS):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            raise CheckpointError(f"{path}: not a name that Nanotron gives to a tensor's file")
        folders = path.parent.relative_to(root / WEIGHTS).parts
        param = ".".join((*folders, match["leaf"]))
        is_sharded = match["tp"] is not None
        tp_rank = int(match["tp_rank"]) if is_sharded else None
        if is_sharded and int(match["pp_rank"]) >= int(match["pp"]):
            raise CheckpointError(f"{path}: there is no such stage among {match['pp']}")
        if is_sharded:
            sizes.setdefault((int(match["tp"]), int(match["pp"])), path)
        header = _read_tensor(path)
        read[path] = header.read
        info, metadata = header.tensors[TENSOR], header.metadata
        pp_rank, ep_rank, ep = (int(match[name] or 0) for name in ("pp_rank", "ep_rank", "ep"))
        if ep and (tp_rank or ep_rank >= ep):
            raise CheckpointError(
                f"{path}: experts that are split over {ep} ranks lie in files of tensor-parallel "
                "rank 0, and this is none of those"
            )
        shard = Shard(path, info, metadata, tp_rank or 0, pp_rank, ep_rank)
        shards = (experts.setdefault(ep, {}) if ep else found).setdefault(param, {})
        rank = ep_rank if ep else tp_rank
        if rank in shards:
            raise CheckpointError(
                f"{path}: {shards[rank].path.name} holds the same shard of {param}: files of "
                f"two topologies are mixed. {STALE}"
            )
        shards[rank] = shard
    if not found:
        raise CheckpointError(f"{root / WEIGHTS}: there are no tensors in it")
    if len(sizes) > 1:
        (first, first_path), (second, second_path) = list(sizes.items())[:2]
        raise CheckpointError(
            f"{root}: files of two topologies are mixed: TP={first[0]} PP={first[1]} "
            f"({first_path.name}) and TP={second[0]} PP={second[1]} ({second_path.name}). {STALE}"
        )
    _check_experts(root, experts, found)
    tp, pp = next(iter(sizes), (1, 1))
    ep, split = next(iter(experts.items()), (1, {}))
    there = _ranks_there(found, tp, pp)
    part = None if there is None else there.tp
    if there is not None and part is not None and not takes_part:
        _check_metadata(root, sizes)
        raise PartialCheckpointError(_says_part(root, found, there, tp, pp))
    params = {
        **{param: _in_order(root, param, shards, tp, part) for param, shards in found.items()},
        **{param: _in_order(root, param, each, ep, None, "EP") for param, each in split.items()},
    }
    _check_metadata(root, sizes)
    return NanotronCheckpoint(
        root,
        model_config,
        params,
        frozenset([*(param for param, shards in found.items() if None not in shards), *split]),
        tp,
        pp,
        there,
        ep=ep,
        read=read,
    )


def _ranks_there(found: Mapping[str, Mapping[int | None, Shard]], tp: int, pp: int) -> Ranks | None:
    """Whose files are there, where it is not those of all ranks.

    Tensor-parallel ranks count where every parameter that is split has the same: else something is
    lost, and it is for no rank.
    """
    split = [shards for shards in found.values() if None not in shards]
    ranks = {frozenset(rank for rank in shards if rank is not None) for shards in split}
    stages = {shard.pp_rank for shards in split for shard in shards.values()}
    some_ranks = None
    if len(ranks) == 1:
        (only,) = ranks
        some_ranks = only if len(only) < tp and max(only) < tp else None
    some_stages = frozenset(stages) if split and len(stages) < pp else None
    return None if some_ranks is some_stages is None else Ranks(some_stages, some_ranks)


def _says_part(
    root: Path, found: Mapping[str, Mapping[int | None, Shard]], there: Ranks, tp: int, pp: int
) -> str:
    param, shards = next((param, each) for param, each in found.items() if None not in each)
    missing = next(rank for rank in range(tp) if rank not in shards)
    stage = next(iter(shards.values())).pp_rank
    missing_path = tensor_path(param, (stage, pp, missing, tp))
    return f"{root}: {says_part(there, tp, pp)}: {missing_path} is missing"


def says_part(there: Ranks, tp: int, pp: int) -> str:
    """What to say of a checkpoint that has the files of some ranks alone."""
    return f"files of ranks {there} of TP={tp} PP={pp} are there alone, as --ranks-only writes them"


def _check_experts(
    root: Path,
    experts: Mapping[int, Mapping[str, Mapping[int | None, Shard]]],
    others: Mapping[str, Mapping[int | None, Shard]],
) -> None:
    """Raises CheckpointError where files of two topologies are mixed."""
    examples = {
        f"EP={ep}": next(iter(next(iter(params.values())).values())).path
        for ep, params in experts.items()
    }
    for params in experts.values():
        for param in params:
            if param in others:
                examples["EP=1"] = next(iter(others[param].values())).path
    if len(examples) > 1:
        said = " and ".join(f"{size} ({path.name})" for size, path in [*examples.items()][:2])
        raise CheckpointError(f"{root}: files of two topologies are mixed: {said}. {STALE}")


def _check_metadata(root: Path, sizes: Mapping[tuple[int, int], Path]) -> None:
    """Holds the ranks that files' names speak of to what was said of them when they were written.

    Raises CheckpointError.
    """
    path = root / METADATA
    told = read_json_object(path).get("tp") if path.is_file() else None
    for (tp, _), example in sizes.items():
        if isinstance(told, int) and told != tp:
            raise CheckpointError(
                f"{path}: it says tp={told}, and the files of the weights are of TP={tp} "
                f"({example.name}). {STALE}, or write its metadata anew"
            )


def _tensor_files(folder: Path) -> Iterator[Path]:
    for directory, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".safetensors"):
                yield Path(directory, name)


def _read_tensor(path: Path) -> Header:
    header = read_header(path)
    if list(header.tensors) != [TENSOR]:
        names = ", ".join(header.tensors) or "nothing"
        raise CheckpointError(f"{path}: it holds {names}; a Nanotron file holds one {TENSOR!r}")
    return header


def _in_order(
    root: Path,
    param: str,
    shards: Mapping[int | None, Shard],
    tp: int,
    part: frozenset[int] | None,
    axis: str = "TP",
) -> tuple[Shard, ...]:
    if None in shards:
        if len(shards) > 1:
            raise CheckpointError(
                f"{root}: {param} is there both whole and in shards: files of two topologies are "
                f"mixed. {STALE}"
            )
        return (shards[None],)
    if part is not None:
        return tuple(shards[rank] for rank in sorted(part))
    if len(shards) != tp or any(rank not in range(tp) for rank in shards):
        # The size is what a file's name says: it may be anything.
        missing = list(itertools.islice((rank for rank in range(tp) if rank not in shards), 5))
        raise CheckpointError(
            f"{root}: {param} has shards of {axis} ranks {sorted(rank or 0 for rank in shards)} of "
            f"{tp}" + (f"; {missing} are missing" if missing else "")
        )
    return tuple(shards[rank] for rank in range(tp))


def metadata_document(version: str, tp: int) -> dict[str, Any]:
    """`checkpoint_metadata.json` of a checkpoint that nothing was trained on yet."""
    if version == "1.2":
        metas: dict[str, Any] = {"consumed_train_samples": 0, "last_train_step": 0}
        return {"dp": 1, "metas": metas, "tp": tp, "version": version}
    stage = {
        "consumed_tokens_per_dataset_folder": {},
        "consumed_train_samples": 0,
        "name": "Empty",
        "sequence_length": 4096,
        "start_training_step": 0,
    }
    metas = {
        "consumed_tokens_total": 0,
        "consumed_train_samples": 0,
        "data_stages": [stage],
        "last_stage_idx": None,
        "last_train_step": 0,
    }
    return {
        "cp": 1,
        "custom_metas": None,
        "dp": 1,
        "metas": metas,
        "tp": tp,
        "version": version,
    }
