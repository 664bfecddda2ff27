"""One training step over our modules, and over transformers': the same weights and batches.

Both sum the gradients of micro-batches in fp32, clip their norm and step with AdamW on fp32
weights. What computes in bf16 differs as it does for their users: ours has bf16 parameters beside
fp32 masters, transformers fp32 parameters under autocast, as its Trainer's `bf16=True` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from benchmarks.training.shapes import Shape
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.models.facts import facts_of
from nanotron_fast.parallel.pipeline import Pipeline
from nanotron_fast.train.gradients import Gradients
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer import AdamW
from nanotron_fast.train.parameters import trained_parameters
from nanotron_fast.train.step import TrainingStep

_RATE, _BETAS, _EPS, _DECAY = 3e-4, (0.9, 0.95), 1e-8, 0.1
_MAX_NORM = 1.0

# Takes a number, gives the loss before the update and the norm before clipping.
Step = Callable[[int], tuple[Tensor, Tensor]]


def batch(shape: Shape, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and their targets (rows, length) of a step."""
    generator = torch.Generator().manual_seed(number)
    rows = shape.rows * shape.micro_batches
    ids = torch.randint(shape.vocab, (rows, shape.length + 1), generator=generator).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def transformers_model(shape: Shape, device: torch.device) -> nn.Module:
    """With random weights in fp32, the same for every side."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape.config, attn_implementation="sdpa")
    with device:
        return LlamaForCausalLM(config)


@torch.no_grad()
def fill(decoder: Decoder, model: nn.Module) -> None:
    """Copies a transformers model's weights into ours, layer by layer."""
    theirs, ours = dict(model.named_parameters()), dict(decoder.named_parameters())

    def put(name: str, *names: str) -> None:
        ours.pop(f"model.{name}.weight").copy_(
            torch.cat([theirs.pop(f"{each}.weight") for each in names])
        )

    put("token_position_embeddings.pp_block.token_embedding", "model.embed_tokens")
    for number in range(len(decoder.layers)):
        here, there = f"decoder.{number}.pp_block", f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            put(f"{here}.{norm}", f"{there}.{norm}")
        put(f"{here}.attn.qkv_proj", *(f"{there}.self_attn.{x}_proj" for x in "qkv"))
        put(f"{here}.attn.o_proj", f"{there}.self_attn.o_proj")
        put(f"{here}.mlp.gate_up_proj", *(f"{there}.mlp.{x}_proj" for x in ("gate", "up")))
        put(f"{here}.mlp.down_proj", f"{there}.mlp.down_proj")
    put("final_layer_norm.pp_block", "model.norm")
    put("lm_head.pp_block", "lm_head")
    if ours or theirs:
        raise ValueError(f"weights that have no counterpart: {[*ours, *theirs]}")


def our_decoder(shape: Shape, device: torch.device, dtype: torch.dtype) -> Decoder:
    return Decoder(shape.architecture, dtype=dtype, device=device)


def our_step(shape: Shape, decoder: Decoder, device: torch.device) -> Step:
    """A step as a run of ours takes it on one rank."""
    mesh = Mesh.connect(device=device)
    trained = trained_parameters([decoder], [facts_of(decoder)], mesh, zero_stage=0)
    pipeline = Pipeline(
        [decoder], hidden_size=shape.hidden, dtype=next(decoder.parameters()).dtype, device=device
    )
    optimizer = AdamW(
        trained, mesh, learning_rate=_RATE, betas=_BETAS, eps=_EPS, weight_decay=_DECAY
    )
    gradients = Gradients(trained, mesh, zero_stage=0)
    training = TrainingStep(pipeline, gradients, optimizer, mesh, max_norm=_MAX_NORM)

    def step(number: int) -> tuple[Tensor, Tensor]:
        ids, labels = batch(shape, number, device)
        result = training(ids, labels, lambda peak: peak, micro_batch_size=shape.rows)
        return result.loss, result.grad_norm

    return step


def transformers_step(
    shape: Shape, model: nn.Module, device: torch.device, dtype: torch.dtype
) -> Step:
    """The loop that its users write: accumulation, clipping, torch's fused AdamW."""
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=_RATE, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, fused=True
    )
    is_mixed = dtype != torch.float32
    autocast = torch.autocast(device.type, dtype) if is_mixed else nullcontext()

    def step(number: int) -> tuple[Tensor, Tensor]:
        ids, labels = batch(shape, number, device)
        total = torch.zeros((), device=device)
        for rows, targets in zip(ids.split(shape.rows), labels.split(shape.rows), strict=True):
            with autocast:
                loss = model(rows, labels=targets, shift_labels=targets).loss
                loss = loss / shape.micro_batches
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return total, norm

    return step
