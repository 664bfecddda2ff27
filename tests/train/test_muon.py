"""Muon: torch's own on one process, and the same however its parameters are spread."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.nanotron.slices import shard_pairs
from nanotron_fast.kernels.runtime.collectives import Ranks
from nanotron_fast.model.spec import Attention, Dense, Experts, Layer, ModelSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.models import Architecture, Decoder, facts_of, initialize
from nanotron_fast.models.facts import Facts
from nanotron_fast.parallel.communication import Pending
from nanotron_fast.train import matrices
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.muon import Muon
from nanotron_fast.train.optimizer import AdamW
from nanotron_fast.train.optimizer_choice import optimizer_of
from nanotron_fast.train.optimizer_states import load_states
from nanotron_fast.train.orthogonal import orthogonal
from nanotron_fast.train.parameters import Trained, trained_parameters
from tests.train.configs import read
from tests.train.engine import Case, Run, check_against_plain
from tests.train.resuming import check_resume, save_run

CPU = torch.device("cpu")
PEAK, DECAY, BETAS, MAX_NORM = 3e-3, 0.1, (0.9, 0.95), 0.7
EXCLUDED = (r".*layernorm", r".*bias")
INNER, NUM_EXPERTS = 12, 3


def decoder_of(tp: int = 1, tp_rank: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    """A dense layer and one of experts, filled with the same numbers at every topology."""
    attention = Attention(4, 2, 8, (0, 8), has_qkv_bias=True)
    experts = Experts(NUM_EXPERTS, 2, INNER, 20, has_shared_expert=True)
    spec = ModelSpec(
        hidden_size=32,
        layers=(Layer(attention, Dense(48)), Layer(attention, experts)),
        intermediate_size=48,
        vocab_size=64,
        max_position_embeddings=64,
        hidden_act="silu",
        norm_eps=1e-6,
        initializer_range=0.1,
        rope_theta=1e4,
        tie_word_embeddings=False,
    )
    architecture = Architecture.of_spec(spec)
    decoder = Decoder(architecture, topology=Topology(tp=tp), dtype=dtype, device="cpu")
    initialize(decoder, tp_rank=tp_rank)
    return decoder


def whole_grad(facts: Facts, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{facts.name} {number}".encode()))
    return torch.randn(facts.whole_shape, generator=generator)


def sides(facts: Facts, tp: int, tp_rank: int) -> Iterator[tuple[Any, Any]]:
    """Which part of a shard is which of the whole."""
    param = facts.param
    for pair in shard_pairs(
        param.shape, split=param.cuts.get("tp"), chunks=param.chunks, tp=tp, rank=tp_rank
    ):
        yield pair.local, pair.whole


def rank_of(mesh: Mesh, zero: int, **changes: Any) -> Muon:
    decoder = decoder_of(mesh.tp, mesh.tp_rank)
    trained = trained_parameters([decoder], [facts_of(decoder)], mesh, zero_stage=zero)
    constants = {"betas": BETAS, "weight_decay": DECAY, "excluded": EXCLUDED, **changes}
    return Muon(trained, mesh, learning_rate=PEAK, zero_stage=zero, **constants)


def step(optimizer: Muon, mesh: Mesh, number: int, scale: Tensor | None = None) -> None:
    shares = []
    for state in optimizer.states:
        each = state.trained
        grad, whole = torch.zeros(each.tensor.shape), whole_grad(each.facts, number)
        for local, region in sides(each.facts, mesh.tp, mesh.tp_rank):
            grad[local] = whole[region]
        shares.append(each.share(grad))
    optimizer.step(shares, lambda peak: peak / (number + 1), scale)


# --- What is computed


def matrices_in(trained: Trained, tensor: Tensor) -> list[Tensor]:
    """The matrices of a parameter, written down by its name."""
    kind = trained.name.split("pp_block.")[-1]
    if kind == "attn.qkv_proj.weight":
        return list(tensor.split((32, 16, 16)))
    if kind == "mlp.gate_up_proj.weight":
        return list(tensor.split(48))
    if kind == "mlp.shared_expert.gate_up_proj.weight":
        return list(tensor.split(20))
    if kind == "mlp.experts.merged_gate_up_proj":
        return [half for expert in tensor for half in expert.split(INNER, 1)]
    if kind == "mlp.experts.merged_down_proj":
        return list(tensor)
    is_one = kind in ("attn.o_proj.weight", "mlp.down_proj.weight")
    return [tensor] if is_one or kind == "mlp.shared_expert.down_proj.weight" else []


@pytest.mark.parametrize("is_nesterov", [True, False])
def test_ten_steps_are_those_of_torch(is_nesterov: bool) -> None:
    """In bf16, which is all that torch's Muon knows, with clipping and decay."""
    mesh = Mesh(device=CPU)
    ours = rank_of(mesh, 0, nesterov=is_nesterov, ns_dtype=torch.bfloat16)
    theirs = decoder_of()
    pairs = [(state.trained, theirs.get_parameter(state.trained.name)) for state in ours.states]
    pieces: list[tuple[nn.Parameter, Tensor]] = []
    groups: dict[float, list[nn.Parameter]] = {0.0: [], DECAY: []}
    for trained, tensor in pairs:
        tensor.grad = torch.zeros_like(tensor)
        found = zip(
            matrices_in(trained, tensor.data), matrices_in(trained, tensor.grad), strict=True
        )
        pieces += [(nn.Parameter(piece), grad) for piece, grad in found]
        if not matrices_in(trained, tensor):
            is_decayed = not trained.name.endswith(("norm.weight", "bias"))
            is_final_norm = "final_layer_norm" in trained.name
            groups[DECAY if is_decayed or is_final_norm else 0.0].append(tensor)
    assert len(pieces) == 2 * 4 + 3 + 3 + 3 * NUM_EXPERTS
    for piece, grad in pieces:
        piece.grad = grad
    adamw = torch.optim.AdamW(
        [{"params": members, "weight_decay": decay} for decay, members in groups.items()],
        betas=BETAS,
    )
    muon = torch.optim.Muon(
        [piece for piece, _ in pieces], weight_decay=DECAY, nesterov=is_nesterov, momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for number in range(10):
        for trained, tensor in pairs:
            tensor.grad.copy_(whole_grad(trained.facts, number))
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), MAX_NORM)
        for group in (*adamw.param_groups, *muon.param_groups):
            group["lr"] = PEAK / (number + 1)
        adamw.step()
        muon.step()
        step(ours, mesh, number, MAX_NORM / (norm + 1e-6))
    for trained, tensor in pairs:
        torch.testing.assert_close(trained.tensor, tensor, rtol=1e-6, atol=1e-7, msg=trained.name)


def test_matrices_become_orthogonal_and_zeros_stay() -> None:
    torch.manual_seed(0)
    for shape in ((2, 24, 40), (2, 40, 24), (1, 16, 16)):
        given = torch.randn(shape)
        kept = given.clone()
        values = torch.linalg.svdvals(orthogonal(given, steps=5, dtype=torch.float32))
        assert 0.3 < values.min() < values.max() < 1.3
        assert torch.equal(given, kept)
    # Each by itself, and by its direction alone.
    alone = orthogonal(given * 7, steps=5, dtype=torch.float32)
    both = orthogonal(torch.cat([torch.zeros_like(given), given]), steps=5, dtype=torch.float32)
    assert not both[0].any()
    torch.testing.assert_close(both[1], alone[0], rtol=1e-5, atol=1e-6)


def test_masters_are_fp32_and_parameters_their_rounding() -> None:
    mesh = Mesh(device=CPU)
    decoder = decoder_of(dtype=torch.bfloat16)
    trained = trained_parameters([decoder], [facts_of(decoder)], mesh, zero_stage=0)
    optimizer = Muon(trained, mesh, learning_rate=PEAK)
    in_fp32 = rank_of(mesh, 0, weight_decay=0.0, betas=(0.9, 0.999))
    for state, other in zip(optimizer.states, in_fp32.states, strict=True):
        other.master.copy_(state.master)  # rounded once
    for number in range(2):
        step(optimizer, mesh, number)
        step(in_fp32, mesh, number)
    for state, other in zip(optimizer.states, in_fp32.states, strict=True):
        assert state.master.dtype == torch.float32
        torch.testing.assert_close(state.master, other.master, rtol=1e-5, atol=1e-6)
        tensor = state.trained.tensor
        assert torch.equal(tensor, state.master.to(tensor.dtype).view_as(tensor))


# --- However it is spread


class Switch:
    """Exchanges between ranks that are threads, in place of a process group."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._sent: list[Sequence[Tensor]] = [()] * size

    def start(
        self, tensor: Tensor, ranks: Ranks, *, sent: Sequence[int], received: Sequence[int]
    ) -> Pending:
        self._sent[ranks.rank] = tensor.split(list(sent))
        self._barrier.wait(60)
        pieces = [each[ranks.rank] for each in self._sent]
        self._barrier.wait(60)
        assert [len(piece) for piece in pieces] == list(received)
        return Pending(torch.cat(pieces))

    def fail(self) -> None:
        self._barrier.abort()


def stepped(
    monkeypatch: pytest.MonkeyPatch, dp: int, tp: int, zero: int
) -> dict[str, dict[str, Tensor]]:
    """Whole masters and moments after three steps on dp * tp ranks, which are threads here."""
    size = dp * tp
    switch, here = Switch(size), threading.local()
    monkeypatch.setattr("nanotron_fast.train.muon.start_all_to_all", switch.start)
    ranks = "nanotron_fast.train.matrices.resolve"
    monkeypatch.setattr(ranks, lambda _: Ranks("", here.rank, size))
    monkeypatch.setattr(AdamW, "_gather", lambda self: None)
    optimizers: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        here.rank = rank
        mesh = Mesh(dp=dp, tp=tp, rank=rank, device=CPU)
        try:
            optimizers[rank] = rank_of(mesh, zero)
            for number in range(3):
                step(optimizers[rank], mesh, number)
        except BaseException as error:
            errors.append(error)
            switch.fail()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return wholes(optimizers, dp, tp)


def wholes(optimizers: list[Muon], dp: int, tp: int) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for place, state in enumerate(optimizers[0].states):
        facts = state.trained.facts
        for key in ("master", *state.moments):
            whole = torch.full(facts.whole_shape, float("nan"))
            for rank, optimizer in enumerate(optimizers):
                own = optimizer.states[place]
                shard = torch.full((own.trained.num_elements,), float("nan"))
                first, end = own.trained.run
                shard[first:end] = own.master if key == "master" else own.moments[key]
                shard = shard.view(own.trained.tensor.shape)
                for local, region in sides(facts, tp, rank % tp):
                    part = shard[local]
                    is_here = ~part.isnan()
                    seen = whole[region]
                    # Ranks that have the same elements agree.
                    assert torch.equal(*(each[is_here & ~seen.isnan()] for each in (seen, part)))
                    whole[region] = torch.where(is_here, part, seen)
            assert not whole.isnan().any()
            found.setdefault(facts.name, {})[key] = whole
    return found


def test_every_topology_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # An expert a lot, so that they are shared out too.
    monkeypatch.setattr(matrices, "_MAX_ELEMENTS", 1)
    alone = stepped(monkeypatch, 1, 1, 0)
    kinds = {tuple(values) for values in alone.values()}
    assert kinds == {("master", "momentum_buffer"), ("master", "exp_avg", "exp_avg_sq")}
    for dp, tp, zero in ((2, 1, 0), (2, 1, 1), (1, 2, 0), (3, 2, 0), (3, 2, 1)):
        spread = stepped(monkeypatch, dp, tp, zero)
        for name, values in alone.items():
            for key, value in values.items():
                # Of a run of odd length the last elements may be rounded in another way.
                torch.testing.assert_close(
                    spread[name][key], value, rtol=1e-5, atol=1e-6, msg=f"{dp} {tp} {zero} {name}"
                )


def test_experts_at_once_are_experts_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together = stepped(monkeypatch, 1, 1, 0)
    monkeypatch.setattr(matrices, "_MAX_ELEMENTS", 1)
    for name, values in stepped(monkeypatch, 1, 1, 0).items():
        torch.testing.assert_close(values["master"], together[name]["master"])


def test_one_process_agrees_with_plain_torch() -> None:
    check_against_plain(Case(is_muon=True))


# --- In files


def test_a_run_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    check_resume(Case(is_muon=True), [Case()], tmp_path)
    (file,) = (tmp_path / "first" / "3" / "optimizer").glob("*.pt")
    document = torch.load(file, weights_only=True)
    for index, name in document["names"].items():
        group, state = document["param_groups"][index], document["state"][index]
        is_matrix = ".pp_block.attn" in name or ".pp_block.mlp" in name
        assert set(state) == {"step"} | (
            {"momentum_buffer"} if is_matrix else {"exp_avg", "exp_avg_sq"}
        )
        assert ("betas" in group) == (not is_matrix)
        if is_matrix:
            assert {key: group[key] for key in ("momentum", "nesterov", "ns_steps")} == {
                "momentum": 0.95,
                "nesterov": True,
                "ns_steps": 5,
            }


def test_states_of_the_other_optimizer_are_refused(tmp_path: Path) -> None:
    runs = {is_muon: Run(Case(is_muon=is_muon)) for is_muon in (False, True)}
    for is_muon, run in runs.items():
        run.step(0)
        folder = save_run(run, tmp_path / str(is_muon), 1)
        missing = (
            "exp_avg, it has momentum_buffer" if is_muon else "momentum_buffer, it has exp_avg"
        )
        with pytest.raises(CheckpointError, match=rf"\.pt: .*qkv_proj.weight has no {missing}"):
            load_states(folder, runs[not is_muon].optimizer, run.mesh)


# --- By a configuration


def chosen(**changes: Any) -> AdamW:
    config = read(**changes)
    mesh = Mesh(device=CPU)
    decoder = decoder_of()
    trained = trained_parameters([decoder], [facts_of(decoder)], mesh, zero_stage=0)
    return optimizer_of(config, trained, mesh, peaks={trained[1].name: 5.0})


def factory(**fields: Any) -> Mapping[str, Any]:
    return {"optimizer__optimizer_factory": fields}


def test_the_optimizer_of_a_configuration() -> None:
    excluded = {"optimizer__weight_decay_exclude_named_params": [".*bias"]}
    muon = chosen(
        **factory(name="muon", muon_momentum=0.9, muon_nesterov=False, muon_ns_steps=3,
                  adam_beta1=0.8, adam_beta2=0.7, adam_eps=1e-5),
        **excluded,
    )  # fmt: skip
    assert isinstance(muon, Muon)
    assert (muon.momentum, muon.nesterov, muon.ns_steps) == (0.9, False, 3)
    assert (muon.betas, muon.eps) == ((0.8, 0.7), 1e-5)
    adamw = chosen(**excluded)
    assert type(adamw) is AdamW
    assert (adamw.betas, adamw.eps) == ((0.9, 0.95), 1e-8)
    for optimizer in (muon, adamw):
        for place, (state, constants) in enumerate(
            zip(optimizer.states, optimizer.constants(), strict=True)
        ):
            decay = 0.0 if state.trained.name.endswith("bias") else 0.01
            assert constants == (5.0 if place == 1 else 3e-4, decay)
