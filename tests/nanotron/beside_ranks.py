"""Ranks that train with real Nanotron and with ours, and go on with each other's checkpoints.

`python -m tests.nanotron.beside_ranks FOLDER PORT SIZE`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

import nanotron_fast as nf
from nanotron_fast.patch.cpu import cpu_mode
from nanotron_fast.patch.importing import import_nanotron
from tests import modelzoo
from tests.nanotron.beside import (
    SAVED,
    Figures,
    Grid,
    check_same,
    document,
    is_main,
    train_nanotron,
    train_ours,
    written,
)
from tests.nanotron.training import SIZES, join_environment
from tests.parallel.ranks import run_cases

# bf16 rounds where each multiplies and sums in another order.
BF16: dict[str, Any] = {"dtype": "bfloat16", "tolerance": 2e-3}
SCATTERED = "REDUCE_SCATTER"
GRIDS = [
    Grid(tp=2, is_tied=True, mode=SCATTERED),
    Grid(dp=2),
    Grid(pp=2, is_tied=True),
    Grid(tp=2, dp=2, mode=SCATTERED, zero_stage=1),
]
if is_main():
    GRIDS += [
        Grid("qwen2", is_tied=True),
        Grid("qwen2_moe"),
        Grid("qwen2", tp=2, mode=SCATTERED, recomputes=True),
        Grid(tp=2, **BF16),
        Grid(dp=2, zero_stage=1),
    ]
else:
    # Main has not implemented the one, and cannot read the other's configuration.
    GRIDS += [
        Grid(dp=2, zero_stage=1, **BF16),
        Grid("starcoder2", tp=2, mode=SCATTERED, is_tied=True),
    ]


# Whose batches are the same: with as many data-parallel ranks.
RESHARDED = [
    (Grid(tp=2, is_tied=True, mode=SCATTERED), Grid(pp=2, is_tied=True)),
    (Grid(pp=2), Grid(tp=2, mode=SCATTERED)),
    (Grid(tp=2, dp=2, mode=SCATTERED), Grid(pp=2, dp=2, zero_stage=1)),
]


def weights_of(grid: Grid, folder: Path) -> Path:
    """A checkpoint for the ranks to begin with, and what it was converted from."""
    name = f"{grid.family}-{grid.is_tied}-{grid.dtype}"
    root = folder / f"{name}-pp{grid.pp}-tp{grid.tp}"
    if not root.exists():
        dtype = "F32" if grid.dtype == "float32" else "BF16"
        model = modelzoo.make(grid.family, dtype=dtype, **SIZES, tie_word_embeddings=grid.is_tied)
        hf = folder / f"{name}-hf"
        if not hf.exists():
            model.save(hf)
        old: dict[str, Any] = {}
        if not is_main():
            interleaved = True if grid.family == "llama" else None
            old = {"checkpoint_version": "1.2", "rope_interleaved": interleaved}
        nf.convert(hf, root, topology=nf.Topology(tp=grid.tp, pp=grid.pp), **old)
    return root


def compare(grid: Grid, folder: Path) -> None:
    """Straight runs of both, and of each the second half from the other's checkpoint."""
    if dist.get_rank() == 0:
        weights_of(grid, folder)
    dist.barrier()
    weights = weights_of(grid, folder)
    straight: dict[str, Figures] = {}
    saved: dict[str, Path] = {}
    for who, train in (("nanotron", train_nanotron), ("ours", train_ours)):
        root = folder / f"{grid}-{who}"
        straight[who] = train(written(root, document(grid, weights, root, None)), grid)
        saved[who] = root / str(SAVED)
    check_same(straight["ours"], straight["nanotron"], grid, "straight")

    root = folder / f"{grid}-ours-from-nanotron"
    config = written(root, document_of(saved["nanotron"], root))
    resumed = train_ours(config, grid)
    check_same(resumed, second_half(straight["nanotron"]), grid, "Nanotron's, resumed by ours")

    root = folder / f"{grid}-nanotron-from-ours"
    config = written(root, document_of(saved["ours"], root))
    if not is_main():  # which has another schema, and refuses a later version than its own
        if dist.get_rank() == 0:
            make_older(saved["ours"])
        dist.barrier()
        config = written(root, document(grid, weights, root, saved["ours"]))
    resumed = train_nanotron(config, grid, saved["ours"])
    check_same(resumed, second_half(straight["ours"]), grid, "ours, resumed by Nanotron")


def compare_resharded(here: Grid, there: Grid, folder: Path) -> None:
    """Ours at one topology; then both go on with it at another, Nanotron by its own way to load."""
    first = dist.get_rank() == 0
    if first:
        weights_of(here, folder)
        weights_of(there, folder)
    dist.barrier()
    root = folder / f"{here}-to-{there}"
    config = written(root, document(here, weights_of(here, folder), root, None))
    straight = train_ours(config, here)
    saved = folder / f"{there}-resharded" / str(SAVED)
    sizes = {"tp": there.tp, "pp": there.pp, "dp": there.dp, "zero_stage": there.zero_stage}
    if first:
        nf.reshard(root / str(SAVED), saved, **sizes)
    dist.barrier()
    config = written(root, document_of(saved, folder / f"{there}-by-ours"))
    resumed = train_ours(config, there)
    check_same(resumed, second_half(straight), there, "resharded, resumed by ours")
    if first and not is_main():
        make_older(saved)
    dist.barrier()
    checkpoints = folder / f"{there}-by-nanotron"
    config = written(checkpoints, document(there, weights_of(there, folder), checkpoints, saved))
    resumed = train_nanotron(config, there, saved)
    check_same(resumed, second_half(straight), there, "resharded, resumed by Nanotron")


def second_half(figures: Figures) -> Figures:
    return {step: pair for step, pair in figures.items() if step > SAVED}


def document_of(saved: Path, root: Path) -> dict[str, Any]:
    """The configuration that lies in a checkpoint, to go on with it in another folder."""
    parts: dict[str, Any] = yaml.safe_load((saved / "config.yaml").read_text())
    parts["checkpoints"] |= {"checkpoints_path": str(root), "resume_checkpoint_path": str(saved)}
    return parts


def make_older(saved: Path) -> None:
    """What 0.4 has otherwise: the version, one group of all parameters, one learning rate."""
    path = saved / "checkpoint_metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": "1.2"}))
    for path in (saved / "optimizer").glob("*.pt"):
        states = torch.load(path)
        indices = [index for group in states["param_groups"] for index in group["params"]]
        states["param_groups"] = [{**states["param_groups"][0], "params": indices}]
        torch.save(states, path)
    paths = list((saved / "lr_scheduler").glob("*.pt"))
    rate = torch.load(paths[0])
    for key in ("base_lrs", "_last_lr", "lr_lambdas"):
        del rate[key][1:]
    torch.save(rate, saved / "lr_scheduler/lr_scheduler.pt")
    for path in paths:
        path.unlink()


def cases(folder: str, port: str, size: str) -> Iterator[tuple[str, Callable[[], None]]]:
    import_nanotron()
    join_environment(int(port))
    with cpu_mode():
        from nanotron.distributed import initialize_torch_distributed

        initialize_torch_distributed()
    for grid in GRIDS:
        if grid.size == int(size):
            yield str(grid), partial(compare, grid, Path(folder))
    for here, there in RESHARDED:
        if here.size == int(size):
            name = f"{here} resharded to {there}"
            yield name, partial(compare_resharded, here, there, Path(folder))


if __name__ == "__main__":
    run_cases(cases(*sys.argv[1:]))
