"""A stack of experts in MXFP4, as a rule finds it: by the name and the shape of its tensor.

There is no such family yet, so the parts are written out here: a parameter of each expert's gate,
up and down rows, cut along the inner dimension, from tensors (experts, in, out) whose gate and up
columns interleave.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nanotron_fast.checkpoints.plan.intersection import plan_moves
from nanotron_fast.checkpoints.plan.sides import HfSource, NanotronTarget
from nanotron_fast.errors import CheckpointError, UnsupportedModelError
from nanotron_fast.families.parts import Address, Cut, Param, Part
from nanotron_fast.families.refusals import check_config
from nanotron_fast.formats.huggingface.checkpoint import read_hf
from nanotron_fast.formats.huggingface.quantization import read_quantization
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves import engine
from nanotron_fast.moves import numpy_engine as reference
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.plan import MovePlan
from tests.modelzoo import Tensor, save_tensors, write_json

EXPERTS, HIDDEN, INNER = 3, 96, 64
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
CONFIG = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["router"]}}


def gate_up(half: int) -> Part:
    """The gate (0) or up (1) rows of all experts."""
    return Part(
        tensors=(
            Address(GATE_UP, (EXPERTS, HIDDEN, 2 * INNER), (0, 0, half), (0, 2, 1), (1, 2, 1)),
        ),
        param=Address(
            "gate_up", (EXPERTS, 2 * INNER, HIDDEN), (0, half * INNER, 0), (0, 1, 2), (1, 1, 1)
        ),
        sizes=(EXPERTS, INNER, HIDDEN),
        cuts={"tp": Cut(1, chunk_start=half * INNER)},
    )


DOWN_PART = Part(
    tensors=(Address(DOWN, (EXPERTS, INNER, HIDDEN), (0, 0, 0), (0, 2, 1), (1, 1, 1)),),
    param=Address("down", (EXPERTS, HIDDEN, INNER), (0, 0, 0), (0, 1, 2), (1, 1, 1)),
    sizes=(EXPERTS, HIDDEN, INNER),
    cuts={"tp": Cut(2)},
)
PARAMS = (
    Param(
        "gate_up",
        (EXPERTS, 2 * INNER, HIDDEN),
        (gate_up(0), gate_up(1)),
        0,
        {"tp": 1},
        (INNER, INNER),
    ),
    Param("down", (EXPERTS, HIDDEN, INNER), (DOWN_PART,), 0, {"tp": 2}),
)


def tensors() -> dict[str, Tensor]:
    """Random blocks and scales of both stacks."""
    random = np.random.default_rng(0)
    made = {}
    for name, rows, columns in ((GATE_UP, 2 * INNER, HIDDEN), (DOWN, HIDDEN, INNER)):
        shape = (EXPERTS, rows, columns // 32)
        blocks = random.bytes(EXPERTS * rows * columns // 2)
        scales = random.integers(90, 160, EXPERTS * rows * columns // 32, np.uint8)
        made[f"{name}_blocks"] = Tensor("U8", (*shape, 16), blocks)
        made[f"{name}_scales"] = Tensor("U8", shape, scales.tobytes())
    return made


def source_of(folder: Path, made: dict[str, Tensor]) -> HfSource:
    """A side of a plan."""
    save_tensors(folder, made, shards=2)
    write_json(folder / "config.json", {**CONFIG, "torch_dtype": "bfloat16"})
    checkpoint = read_hf(folder)
    config, warnings = check_config(checkpoint.config, checkpoint.dtypes)
    assert ["dequantised from mxfp4 (blocks of 32)" in each for each in warnings] == [True]
    quantization = read_quantization(checkpoint.config)
    return HfSource(replace(checkpoint, config=config, quantization=quantization))


def dequantised(made: dict[str, Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    """(experts, in, out), by transformers."""
    blocks, scales = (
        torch.frombuffer(bytearray(tensor.data), dtype=torch.uint8).view(tensor.shape)
        for tensor in (made[f"{name}_blocks"], made[f"{name}_scales"])
    )
    return convert_moe_packed_tensors(blocks, scales, dtype=dtype)


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_of_a_transposed_stack(tp: int, dtype: Dtype, tmp_path: Path) -> None:
    made = tensors()
    reader = source_of(tmp_path, made)
    dtypes = {param.name: dtype for param in PARAMS}
    target = NanotronTarget(
        PARAMS, dtypes, Topology(tp=tp), stage_of=lambda block: 0, version="1.5"
    )
    moves = tuple(named.move for named in plan_moves(PARAMS, reader, target))
    assert reader.used == set(made)
    assert reader.dtype(DOWN_PART) is Dtype.BF16
    plan = MovePlan(tuple(reader.files.paths), tuple(target.outputs), moves)
    plan.check()
    by_numpy = reference.execute_in_memory(plan)
    in_torch = {Dtype.BF16: torch.bfloat16, Dtype.F32: torch.float32}[dtype]
    wide = dequantised(made, GATE_UP, in_torch)
    whole = {
        "gate_up": torch.stack([wide[:, :, 0::2], wide[:, :, 1::2]], 1).transpose(2, 3),
        "down": dequantised(made, DOWN, in_torch).transpose(1, 2),
    }
    with tempfile.TemporaryDirectory() as folder:
        engine.execute(plan, Path(folder), workers=2)
        for output in plan.outputs:
            found = (Path(folder) / output.path).read_bytes()
            assert found == by_numpy[output.path].tobytes()
            rank = int(output.path.split("tp-rank-")[1].split("-")[0])
            name = "gate_up" if "gate_up" in output.path else "down"
            shard = whole[name].chunk(tp, 2 if name == "gate_up" else -1)[rank]
            assert found[len(output.header) :] == _bytes(shard)


def _bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [
        (
            f"{DOWN}_blocks",
            Tensor("U8", (EXPERTS, HIDDEN, 3, 16), bytes(EXPERTS * HIDDEN * 48)),
            CheckpointError,
            r"down_proj_blocks has shape \[3, 96, 3, 16\].*takes \[3, 96, 2, 16\] and \[3, 96, 2\]",
        ),
        (
            f"{DOWN}_scales",
            Tensor("F8_E8M0", (EXPERTS, HIDDEN, 2), bytes(EXPERTS * HIDDEN * 2)),
            UnsupportedModelError,
            "F8_E8M0, U8.*which is not read",
        ),
        (
            f"{DOWN}_scales",
            None,
            CheckpointError,
            "down_proj_scales is missing: mxfp4 takes both",
        ),
    ],
    ids=["shape", "dtype", "missing"],
)
def test_what_does_not_fit_is_refused(
    name: str, changed: Tensor | None, error: Any, message: str, tmp_path: Path
) -> None:
    made = tensors()
    del made[name]
    if changed is not None:
        made[name] = changed
    with pytest.raises(error, match=message):
        source_of(tmp_path, made).find(DOWN_PART)
