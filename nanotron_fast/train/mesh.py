"""The ranks of a run in Nanotron's order: tensor parallelism fastest, then data, then pipeline.

    rank = (pp_rank * dp + dp_rank) * tp + tp_rank

Source: ParallelContext in nanotron/parallel/context.py at 2411b022, whose context group has one
rank here. Its expert-parallel ranks are ranks beside all others. Here they are data-parallel ranks,
each with a batch of its own, which have some experts of each layer in place of all: with edp = dp /
ep ranks that have the same ones,

    dp_rank = edp_rank * ep + ep_rank
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nanotron_fast.checkpoints import processes
from nanotron_fast.errors import TopologyError
from nanotron_fast.kernels.runtime.collectives import Group

AXES = ("pp", "dp", "tp")
EXPERT_AXES = ("pp", "edp", "ep", "tp")


@dataclass(frozen=True, slots=True)
class Replicas:
    """The ranks that have the same shard of a parameter, and tokens of their own.

    Args:
        group: they; None for one rank.
        size: of them.
        rank: of this process among them.
    """

    group: Group
    size: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Where this process is among the ranks of a run.

    Args:
        dp, pp, tp, ep: sizes of the groups; ep divides dp.
        rank: of this process in the run.
        device: on which it computes.
        device_mesh: the same in torch's words, its dimensions called as AXES; None for one rank.
        expert_mesh: likewise with EXPERT_AXES; None without expert parallelism.
        tp_group, dp_group, pp_group: the groups that this rank is in; None where it is alone.
        ep_group: the ranks that a layer's experts are split over; None where they are not.
        edp_group: the data-parallel ranks that have the same experts; None where it is alone.
        stage_group: the ranks of its pipeline stage, tp fastest; None where it is alone.
        expert_stage_group: of these, the ranks that have the same experts; None where it is alone.
        tied_group: the first and the last stage of a pipeline, with the same dp and tp rank; None
            on other stages and without a pipeline.
        world: all ranks; None for one rank.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    ep: int = 1
    rank: int = 0
    device: torch.device
    device_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    tp_group: Group = None
    dp_group: Group = None
    pp_group: Group = None
    ep_group: Group = None
    edp_group: Group = None
    stage_group: Group = None
    expert_stage_group: Group = None
    tied_group: Group = None
    world: Group = None

    @classmethod
    def connect(
        cls,
        *,
        dp: int = 1,
        pp: int = 1,
        tp: int = 1,
        ep: int = 1,
        device: torch.device | str | None = None,
    ) -> Mesh:
        """Where this process is among those that are connected, or alone where one is enough.

        Args:
            dp, pp, tp, ep: sizes of the groups.
            device: to compute on; by default, and for "cuda", the GPU of this process's LOCAL_RANK.
                Without a GPU the default is the CPU.

        Raises TopologyError where the run has another number of processes, or ep does not divide
        dp.
        """
        for name, size in (("dp", dp), ("pp", pp), ("tp", tp), ("ep", ep)):
            if size < 1:
                raise TopologyError(f"{name}={size}: a group has at least one rank")
        if dp % ep:
            raise TopologyError(f"ep={ep} does not divide dp={dp}, whose ranks it is made of")
        where = _device(device)
        wanted, started = dp * pp * tp, num_processes()
        if wanted != started:
            advice = f"use torchrun with --nproc-per-node times --nnodes {wanted}"
            raise TopologyError(
                f"dp={dp} pp={pp} tp={tp} {'is 1 rank' if wanted == 1 else f'are {wanted} ranks'}, "
                f"and {started} {'process was' if started == 1 else 'processes were'} started: "
                f"{advice if wanted > 1 else 'start it without torchrun'}"
            )
        if where.type == "cuda":
            torch.cuda.set_device(where)
        if wanted == 1:
            return cls(device=where)
        mesh = init_device_mesh(where.type, (pp, dp, tp), mesh_dim_names=AXES)
        groups = {
            f"{axis}_group": mesh.get_group(axis) if size > 1 else None
            for axis, size in zip(AXES, (pp, dp, tp), strict=True)
        }
        expert_mesh: DeviceMesh | None = None
        stage_group = _stage_group(dp, pp, tp, groups)
        same = {"edp_group": groups["dp_group"], "expert_stage_group": stage_group}
        if ep > 1:
            sizes = (pp, dp // ep, ep, tp)
            expert_mesh = init_device_mesh(where.type, sizes, mesh_dim_names=EXPERT_AXES)
            edp_group = expert_mesh.get_group("edp") if dp > ep else None
            same = {
                "ep_group": expert_mesh.get_group("ep"),
                "edp_group": edp_group,
                "expert_stage_group": _expert_stage_group(expert_mesh, edp_group, groups),
            }
        return cls(
            dp=dp,
            pp=pp,
            tp=tp,
            ep=ep,
            rank=dist.get_rank(),
            device=where,
            device_mesh=mesh,
            expert_mesh=expert_mesh,
            stage_group=stage_group,
            tied_group=_tied_group(dp, pp, tp),
            world=dist.group.WORLD,
            **groups,
            **same,
        )

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp * self.dp)

    @property
    def ep_rank(self) -> int:
        return self.dp_rank % self.ep

    @property
    def edp(self) -> int:
        """Ranks that have the same experts."""
        return self.dp // self.ep

    @property
    def edp_rank(self) -> int:
        return self.dp_rank // self.ep

    def replicas(self, *, of_experts: bool) -> Replicas:
        """The ranks that have what this one has: of the parameters of experts, or of others."""
        if of_experts:
            return Replicas(self.edp_group, self.edp, self.edp_rank)
        return Replicas(self.dp_group, self.dp, self.dp_rank)

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp


def join(device: torch.device | str | None = None) -> bool:
    """Connects the processes that torchrun started: GPUs over NCCL, everything else over gloo.

    Returns whether that was done here: there may be one process alone, or they are connected.
    Raises ConfigError where they cannot be.
    """
    if dist.is_initialized() or num_processes() == 1:
        return False
    where = _device(device)
    processes.join("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    return True


def leave() -> None:
    """Disconnects them when the interpreter ends; until then another run may use the connection.

    Processes that torchrun started cannot be connected twice: its store keeps the first
    connection's keys, and the second would wait for ever.
    """
    atexit.register(_disconnect)


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:  # which torch.cuda.set_device refuses
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
    return where


def num_processes() -> int:
    """Of this run: those that are connected, or that torchrun has started."""
    if dist.is_initialized():
        return int(dist.get_world_size())
    return processes.told_size()


def _stage_group(dp: int, pp: int, tp: int, groups: Mapping[str, Group]) -> Group:
    """The group of this rank's pipeline stage: one that is there, where one has just its ranks."""
    if pp == 1:
        return dist.group.WORLD
    if dp == 1 or tp == 1:
        return groups["tp_group" if dp == 1 else "dp_group"]
    return _own_group(range(first, first + dp * tp) for first in range(0, pp * dp * tp, dp * tp))


def _expert_stage_group(mesh: DeviceMesh, edp_group: Group, groups: Mapping[str, Group]) -> Group:
    """The group of the ranks of a stage with the same experts: of edp and tp, tp fastest."""
    pp, edp, ep, tp = mesh.mesh.shape
    if edp == 1 or tp == 1:
        return groups["tp_group"] if edp == 1 else edp_group
    return _own_group(
        mesh.mesh[stage, :, ep_rank].flatten().tolist()
        for stage in range(pp)
        for ep_rank in range(ep)
    )


def groups_of_copies(mesh: Mesh, numbers: Iterable[int]) -> dict[int, Group]:
    """By the number of copies of a key-value head, the tensor-parallel ranks that have this rank's.

    Args:
        numbers: of copies, each a divisor of tp; of all layers, the same on every rank.
    """
    found: dict[int, Group] = {}
    for copies in sorted({*numbers} - {1}):
        firsts = range(0, mesh.world_size, copies)
        found[copies] = (
            mesh.tp_group
            if copies == mesh.tp
            else _own_group(range(first, first + copies) for first in firsts)
        )
    return found


def _tied_group(dp: int, pp: int, tp: int) -> Group:
    """The group of the two stages that may have a copy each of one matrix, for this rank."""
    if pp == 1:
        return None
    last_stage = (pp - 1) * dp * tp
    return _own_group((first, last_stage + first) for first in range(dp * tp))


def _own_group(groups: Iterable[Sequence[int]]) -> Group:
    """Makes groups of ranks, which every rank takes part in; returns this rank's, or None."""
    mine: Group = None
    for members in groups:
        group = dist.new_group([*members])
        if dist.get_rank() in members:
            mine = group
    return mine
