"""Which parameters a rank's file of the optimizer numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanotron_fast.model.topology import Topology
from nanotron_fast.models import Architecture, Decoder, facts_of
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer import AdamW
from nanotron_fast.train.optimizer_files import lr_scheduler_document, optimizer_document
from nanotron_fast.train.parameters import trained_parameters
from tests import modelzoo


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_biases_after_a_sum_are_the_first_ranks(tp_rank: int, tmp_path: Path) -> None:
    """Nanotron has them there alone, and takes a file that has just a rank's own parameters."""
    root = modelzoo.make("starcoder2", dtype="F32", num_hidden_layers=1).save(tmp_path)
    device = torch.device("cpu")
    decoder = Decoder(Architecture.of_checkpoint(root), topology=Topology(tp=2), device=device)
    mesh = Mesh(tp=2, rank=tp_rank, device=device)
    trained = trained_parameters([decoder], [facts_of(decoder)], mesh, zero_stage=0)
    optimizer = AdamW(trained, mesh, learning_rate=1e-3)
    document = optimizer_document(optimizer, lambda peak: peak, mesh, zero_stage=0)
    names = [name for name, _ in decoder.named_parameters()]
    biases = {name for name in names if name.endswith(("attn.dense.bias", "ff.c_proj.bias"))}
    assert len(biases) == 2
    wanted = [name for name in names if tp_rank == 0 or name not in biases]
    assert list(document["names"].values()) == wanted
    assert [group["params"] for group in document["param_groups"]] == [
        [index] for index in range(len(wanted))
    ]
    rates = lr_scheduler_document(optimizer, lambda peak: peak, mesh)
    assert len(rates["base_lrs"]) == len(rates["lr_lambdas"]) == len(wanted)
