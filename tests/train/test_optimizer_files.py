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
    rates = lr_scheduler_document(optimizer, lambda peak: peak, mesh, zero_stage=0)
    assert len(rates["base_lrs"]) == len(rates["lr_lambdas"]) == len(wanted)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("ep_rank", [0, 1])
def test_what_is_not_split_is_in_the_file_of_the_first_expert_rank(
    ep_rank: int, zero: int, tmp_path: Path
) -> None:
    """Where states are whole; with ZeRO every rank has its runs of all parameters."""
    root = modelzoo.make("qwen2_moe", dtype="F32", num_hidden_layers=1).save(tmp_path)
    device = torch.device("cpu")
    decoder = Decoder(Architecture.of_checkpoint(root), topology=Topology(ep=2), device=device)
    mesh = Mesh(dp=2, ep=2, rank=ep_rank, device=device)
    trained = trained_parameters([decoder], [facts_of(decoder)], mesh, zero_stage=zero)
    optimizer = AdamW(trained, mesh, learning_rate=1e-3)
    document = optimizer_document(optimizer, lambda peak: peak, mesh, zero_stage=zero)
    has_all = zero == 1 or ep_rank == 0
    names = [name for name, _ in decoder.named_parameters() if has_all or ".experts." in name]
    assert list(document["names"].values()) == names
    assert len(names) > 1
    rates = lr_scheduler_document(optimizer, lambda peak: peak, mesh, zero_stage=zero)
    assert len(rates["base_lrs"]) == len(names)
    for each in trained:
        is_split = ".experts." in each.name
        # Of experts a rank has all states, which no other rank has.
        is_shared_out = zero == 1 and not is_split
        assert (each.run[1] - each.run[0] < each.num_elements) is is_shared_out
        assert each.is_counted is (is_split or is_shared_out or ep_rank == 0)
