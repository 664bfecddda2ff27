"""A step of the trainer finds what the kernels found out about its tensors in the first one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from nanotron_fast.kernels.optimizer import plan
from nanotron_fast.models import Architecture, Decoder, facts_of
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer import AdamW
from nanotron_fast.train.parameters import trained_parameters
from tests import modelzoo
from tests.kernels.plans import counted


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    monkeypatch.setattr(plan, "_looks", {})
    return counted(monkeypatch)


def _stepped(root, backend: str, monkeypatch: pytest.MonkeyPatch, num_steps: int) -> AdamW:
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", backend)
    device = torch.device("cpu")
    decoder = Decoder(Architecture.of_checkpoint(root), device=device)
    torch.manual_seed(0)
    for name, parameter in decoder.named_parameters():
        # Norms stay in fp32: masters of their own, and masters with a copy, in one group each.
        dtype = torch.float32 if "norm" in name else torch.bfloat16
        parameter.data = torch.randn_like(parameter).to(dtype)
        parameter.main_grad = torch.randn(parameter.shape)
    mesh = Mesh(device=device)
    trained = trained_parameters([decoder], [facts_of(decoder)], mesh, zero_stage=0)
    optimizer = AdamW(trained, mesh, learning_rate=1e-2, weight_decay=0.1)
    for _ in range(num_steps):
        # What surrounds a step takes memory and gives it back: nothing has its address by chance.
        _between = [torch.empty(size) for size in (1, 64, 1024)]
        shares = [each.share(each.tensor.main_grad) for each in trained]
        optimizer.step(shares, lambda peak: peak)
    return optimizer


def test_only_the_first_step_makes_tables(
    made: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted here")
    root = modelzoo.make("llama", dtype="F32", num_hidden_layers=1).save(tmp_path)
    _stepped(root, "triton", monkeypatch, 1)
    first = dict(made)
    assert first["looks"] == first["tables"] == 2
    made.clear()
    monkeypatch.setattr(plan, "_looks", {})
    ours = _stepped(root, "triton", monkeypatch, 4)
    assert made == first
    theirs = _stepped(root, "torch", monkeypatch, 4)
    assert ours.num_steps == theirs.num_steps == 4
    for one, other in zip(ours.states, theirs.states, strict=True):
        torch.testing.assert_close(one.master, other.master)
        torch.testing.assert_close(one.trained.tensor, other.trained.tensor)
