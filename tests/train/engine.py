"""A tiny model to train on some ranks, and the same by plain torch on one."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanotron_fast.formats.nanotron.slices import shard_pairs
from nanotron_fast.model.spec import Attention, Dense, Layer, ModelSpec
from nanotron_fast.model.topology import Topology
from nanotron_fast.models.architecture import Architecture
from nanotron_fast.models.building import load
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.models.facts import Facts, facts_of
from nanotron_fast.parallel.pipeline import Pipeline
from nanotron_fast.train.gradients import Gradients
from nanotron_fast.train.mesh import Mesh, groups_of_copies
from nanotron_fast.train.muon import Muon
from nanotron_fast.train.optimizer import AdamW
from nanotron_fast.train.parameters import Trained, trained_parameters
from nanotron_fast.train.step import TrainingStep

# The vocabulary's rows on two tensor-parallel ranks do not split over two others.
HIDDEN, NUM_LAYERS, VOCAB = 32, 4, 70
ROWS, LENGTH, MICRO_BATCHES = 2, 16, 2
PEAK, MAX_NORM, DECAY, BETAS, EPS = 3e-3, 0.5, 0.1, (0.9, 0.95), 1e-8
EXCLUDED = (r".*layernorm", r".*layer_norm", r".*lm_head")


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a run is spread over ranks."""

    dp: int = 1
    pp: int = 1
    tp: int = 1
    schedule: str = "afab"
    chunks: int = 1
    mode: str = "all_reduce"
    zero: int = 0
    is_tied: bool = False
    recompute: str = "none"
    dtype: torch.dtype = torch.float32
    has_documents: bool = False
    is_muon: bool = False
    kv_heads: int = 2
    vocab: int = VOCAB


def architecture(is_tied: bool, kv_heads: int = 2, vocab: int = VOCAB) -> Architecture:
    attention = Attention(num_heads=4, num_kv_heads=kv_heads, head_dim=8, rotary=(0, 8))
    spec = ModelSpec(
        hidden_size=HIDDEN,
        layers=(Layer(attention, Dense(48)),) * NUM_LAYERS,
        intermediate_size=48,
        vocab_size=vocab,
        max_position_embeddings=64,
        hidden_act="silu",
        norm_eps=1e-5,
        initializer_range=0.02,
        rope_theta=10000.0,
        tie_word_embeddings=is_tied,
    )
    # Ranks that outnumber key-value heads have copies under our own class alone.
    return Architecture.of_spec(
        spec, family="llama", model_class="auto" if vocab == VOCAB else "nanotron-fast"
    )


def whole_values(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same on every rank, whatever it has of them."""
    if len(shape) == 1:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * 0.15


@torch.no_grad()
def fill(decoder: Decoder, facts: dict[str, Facts], tp: int, tp_rank: int) -> None:
    for name, tensor in decoder.named_parameters():
        param = facts[name].param
        copy_of = facts[name].tied_with
        whole = whole_values(min(name, copy_of) if copy_of else name, param.shape)
        # A tied matrix goes by its embedding's name.
        if copy_of:
            whole = whole_values(
                "model.token_position_embeddings.pp_block.token_embedding.weight", param.shape
            )
        for pair in shard_pairs(
            param.shape,
            split=param.cuts.get("tp"),
            chunks=param.chunks,
            heads=param.heads,
            tp=tp,
            rank=tp_rank,
        ):
            tensor[pair.local] = whole[pair.whole].to(tensor.dtype)


def batch(step: int, dp: int, dp_rank: int, has_documents: bool = False) -> dict[str, Tensor]:
    """The part of a global batch of 2 * MICRO_BATCHES * ROWS rows that a dp rank has."""
    generator = torch.Generator().manual_seed(step)
    rows = 2 * MICRO_BATCHES * ROWS
    ids = torch.randint(VOCAB, (rows, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, 3] = -100
    tensors = {"input_ids": ids[:, :-1].contiguous(), "labels": labels}
    if has_documents:
        edge = 5 + step % 7
        tensors["position_ids"] = torch.cat(
            [torch.arange(edge), torch.arange(LENGTH - edge)]
        ).repeat(rows, 1)
    return {name: tensor.chunk(dp)[dp_rank].contiguous() for name, tensor in tensors.items()}


def rate(step: int, peak: float) -> float:
    return peak * min(1.0, (step + 1) / 3)


class Run:
    """A rank of a run, which begins with weights of its own or with those of a checkpoint."""

    def __init__(self, case: Case, folder: Path | None = None) -> None:
        self.case = case
        self.mesh = Mesh.connect(dp=case.dp, pp=case.pp, tp=case.tp, device="cpu")
        mesh = self.mesh
        model = self.model()
        self.architecture = model
        self.parts = [
            Decoder(
                model,
                topology=Topology(tp=case.tp, pp=case.pp),
                stage=mesh.pp_rank,
                blocks=blocks(model, case, chunk, mesh.pp_rank),
                group=mesh.tp_group,
                mode=case.mode,
                recompute=case.recompute,
                dtype=case.dtype,
                device="cpu",
            )
            for chunk in range(case.chunks)
        ]
        self.facts = [facts_of(part) for part in self.parts]
        for part, facts in zip(self.parts, self.facts, strict=True):
            if folder is None:
                fill(part, facts, case.tp, mesh.tp_rank)
                continue
            with torch.no_grad():
                for tensor in part.parameters():
                    tensor.fill_(float("nan"))
            load(part, folder, tp_rank=mesh.tp_rank)
        self.trained: list[Trained] = trained_parameters(
            self.parts, self.facts, mesh, zero_stage=case.zero
        )
        self.pipeline = Pipeline(
            self.parts,
            group=mesh.pp_group,
            schedule=case.schedule,
            hidden_size=HIDDEN,
            dtype=case.dtype,
            device=mesh.device,
            tokens_split=case.tp if case.mode == "reduce_scatter" else 1,
        )
        self.optimizer = (Muon if case.is_muon else AdamW)(
            self.trained,
            mesh,
            learning_rate=PEAK,
            betas=BETAS,
            eps=EPS,
            weight_decay=DECAY,
            excluded=EXCLUDED,
            zero_stage=case.zero,
        )
        self.training = TrainingStep(
            self.pipeline,
            Gradients(
                self.trained,
                mesh,
                zero_stage=case.zero,
                copies=groups_of_copies(mesh, [model.spec.copies_of_kv_heads(case.tp)]),
            ),
            self.optimizer,
            mesh,
            max_norm=MAX_NORM,
        )

    def model(self) -> Architecture:
        return architecture(self.case.is_tied, self.case.kv_heads, self.case.vocab)

    def step(self, number: int) -> tuple[float, float]:
        case = self.case
        tensors = batch(number, case.dp, self.mesh.dp_rank, case.has_documents)
        result = self.training(
            **tensors, rate=lambda peak: rate(number, peak), micro_batch_size=ROWS
        )
        return result.loss.item(), result.grad_norm.item()

    def steps(self, first: int, end: int) -> list[tuple[float, float]]:
        return [self.step(number) for number in range(first, end)]

    def evaluate(self, number: int) -> float:
        case = self.case
        tensors = batch(number, case.dp, self.mesh.dp_rank, case.has_documents)
        return self.training.evaluate(**tensors, micro_batch_size=ROWS).item()


def blocks(model: Architecture, case: Case, chunk: int, pp_rank: int):
    if case.chunks == 1:
        return None
    stage = chunk * case.pp + pp_rank
    return model.blocks_of(Topology(tp=case.tp, pp=case.pp * case.chunks), stage)


def plain(
    is_tied: bool,
    has_documents: bool,
    num_steps: int,
    is_muon: bool = False,
    kv_heads: int = 2,
    vocab: int = VOCAB,
) -> tuple[list[tuple[float, float]], float]:
    """Losses and norms by one process, torch's optimizers and clipping; at last a validation."""
    model = architecture(is_tied, kv_heads, vocab)
    decoder = Decoder(model, device="cpu")
    facts = facts_of(decoder)
    fill(decoder, facts, 1, 0)
    named = list(decoder.named_parameters())
    matrices = [
        (tensor, facts[name].param.chunks or (len(tensor),))
        for name, tensor in named
        if is_muon and facts[name].is_hidden_matrix
    ]
    named = [pair for pair in named if all(pair[1] is not tensor for tensor, _ in matrices)]
    muon = TorchMuon(matrices)
    # A tied head goes by its embedding's name, and is decayed.
    no_decay = [tensor for name, tensor in named if "norm" in name or "lm_head" in name]
    decay = [tensor for name, tensor in named if "norm" not in name and "lm_head" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": DECAY}, {"params": no_decay, "weight_decay": 0.0}],
        lr=PEAK,
        betas=BETAS,
        eps=EPS,
    )
    found = []

    def losses(number: int):
        tensors = batch(number, 1, 0, has_documents)
        ids = tensors.pop("input_ids")
        for start in range(0, len(ids), ROWS):
            rows = slice(start, start + ROWS)
            yield decoder(ids[rows], **{k: v[rows] for k, v in tensors.items()}) / (len(ids) / ROWS)

    for number in range(num_steps):
        total = 0.0
        for loss in losses(number):
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = rate(number, PEAK)
        optimizer.step()
        muon.step(rate(number, PEAK))
        decoder.zero_grad()
        found.append((total, norm.item()))
    with torch.no_grad():
        return found, sum(loss.item() for loss in losses(99))


class TorchMuon:
    """torch.optim.Muon in fp32, by AdamW's learning rates, on matrices that are packed in others.

    Each is given with the lengths of what is packed below each other in it.
    """

    def __init__(self, packed: list[tuple[Tensor, tuple[int, ...]]]) -> None:
        self.packed = packed
        self.pieces = [
            [nn.Parameter(piece) for piece in tensor.detach().split(lengths)]
            for tensor, lengths in packed
        ]
        pieces = [piece for of_one in self.pieces for piece in of_one]
        self.optimizer = pieces and torch.optim.Muon(
            pieces, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )

    def step(self, lr: float) -> None:
        if not self.optimizer:
            return
        for (tensor, lengths), pieces in zip(self.packed, self.pieces, strict=True):
            for piece, grad in zip(pieces, tensor.grad.split(lengths), strict=True):
                piece.grad = grad
        self.optimizer.param_groups[0]["lr"] = lr
        # It knows bf16 alone, in which it could not be told from what is wrong by little. Newer
        # versions of torch ask for that dtype by name.
        of_before = mock.patch.object(Tensor, "bfloat16", Tensor.clone)
        with of_before, mock.patch.object(torch, "bfloat16", torch.float32):
            self.optimizer.step()


@functools.cache
def expected(*of: Any) -> tuple[list[tuple[float, float]], float]:
    """What `plain` says; of several ranks the first asks it and tells the others."""
    if not dist.is_initialized():
        return plain(*of)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [plain(*of)]
    dist.broadcast_object_list(found, 0)
    return found[0]


def expected_of(case: Case) -> tuple[list[tuple[float, float]], float]:
    """What is expected of a case: ten steps, or six: those of Muon are as many products."""
    num_steps = 6 if case.is_muon or case.vocab != VOCAB else 10
    return expected(
        case.is_tied, case.has_documents, num_steps, case.is_muon, case.kv_heads, case.vocab
    )


def check_against_plain(case: Case) -> None:
    """Some steps, one validation among them and one after them, against one process."""
    losses, expected_validation = expected_of(case)
    run = Run(case)
    # Gradients of copies are sums over heads in another order.
    tolerance = 1e-5 if case.is_tied else 3e-6 if case.tp > case.kv_heads else 1e-6
    for number, theirs in enumerate(losses):
        if number == 2:
            run.evaluate(98)  # which leaves nothing behind
        ours = run.step(number)
        for what, mine, other in zip(("loss", "norm"), ours, theirs, strict=True):
            error = abs(mine - other) / abs(other)
            assert error <= tolerance, f"{case}: {what} of step {number}: {mine} for {other}"
    validation = run.evaluate(99)
    assert abs(validation - expected_validation) <= tolerance * expected_validation, case
