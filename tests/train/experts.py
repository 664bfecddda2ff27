"""A model of experts, whose routers stay in fp32 and whole: the same by every stage of ZeRO."""

from __future__ import annotations

from dataclasses import replace

import torch

from nanotron_fast.model.spec import Experts, Layer, ModelSpec
from nanotron_fast.models.architecture import Architecture
from tests.train.engine import Case, Run, architecture


class ExpertsRun(Run):
    def model(self) -> Architecture:
        spec: ModelSpec = architecture(is_tied=False).spec
        experts = Experts(4, 2, 16, 24, has_shared_expert=True)
        attention = replace(spec.layers[0].attention, has_qkv_bias=True)
        layers = (Layer(attention, experts),) * 2
        return Architecture.of_spec(replace(spec, layers=layers), family="qwen2_moe")


def check_experts() -> None:
    """Steps of two data-parallel ranks, in fp32 and in bf16."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        expected = ExpertsRun(Case(dp=2, dtype=dtype)).steps(0, 4)
        for zero in (1, 3):
            run = ExpertsRun(Case(dp=2, zero=zero, dtype=dtype))
            found = torch.tensor(run.steps(0, 4))
            torch.testing.assert_close(found, torch.tensor(expected), rtol=tolerance, atol=0)
            for each in run.trained:
                is_router = each.facts.role == "router"
                assert each.is_by_rows is (zero == 3 and not is_router)
                assert not is_router or each.tensor.dtype == torch.float32
