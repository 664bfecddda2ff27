"""A plain Llama decoder, over our operations and over torch's: the same weights, the same step.

Both keep fp32 masters beside bf16 weights, accumulate gradients in fp32, clip to a norm and step
with AdamW. Neither recomputes activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases.products import sdpa
from nanotron_fast.kernels.embedding import vocab_parallel_embedding
from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy
from nanotron_fast.kernels.optimizer import adamw_step_, clip_grad_norm_
from nanotron_fast.kernels.rms_norm import rms_norm, rms_norm_reference
from nanotron_fast.kernels.rope import rope_qkv_reference, rope_tables
from nanotron_fast.parallel import tensor_parallel_attention, tensor_parallel_mlp

_EPS = 1e-5
_ADAM = {"lr": 3e-4, "weight_decay": 0.1, "eps": 1e-8}
_BETAS = (0.9, 0.95)
_MAX_NORM = 1.0


@dataclass(frozen=True)
class Shape:
    """A Llama, and the tokens of a step."""

    hidden: int
    inter: int
    layers: int
    q_heads: int
    kv_heads: int
    vocab: int
    batch: int
    seq: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.q_heads

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def layer_shapes(self) -> list[tuple[int, ...]]:
        """Two norms, QKV, output, gate and up, down."""
        packed = (self.q_heads + 2 * self.kv_heads) * self.head_dim
        return [
            (self.hidden,),
            (packed, self.hidden),
            (self.hidden, self.hidden),
            (self.hidden,),
            (2 * self.inter, self.hidden),
            (self.hidden, self.inter),
        ]

    @property
    def flops(self) -> int:
        """Of a step: three products for each weight that multiplies, and causal attention."""
        layer = sum(s[0] * s[1] for s in self.layer_shapes if len(s) == 2)
        weights = self.layers * layer + self.vocab * self.hidden
        scores = self.layers * self.batch * self.seq * self.seq * self.hidden
        return 6 * weights * self.tokens + 2 * 3 * scores + scores


SHAPES = {
    "1.1B": Shape(2048, 5632, 22, 32, 4, 32000, batch=4, seq=4096),
    "3B": Shape(3072, 8192, 28, 24, 8, 32000, batch=1, seq=4096),
}
TINY = Shape(32, 48, 2, 2, 1, 64, batch=1, seq=16)


def narrow(shape: Shape) -> Shape:
    """As many layers and launches, and so little work that a GPU waits for each of them."""
    hidden = 8 * shape.head_dim
    return replace(shape, hidden=hidden, inter=512, q_heads=8, kv_heads=4, vocab=512, seq=128)


def tiny(shape: Shape) -> Shape:
    """For a dry run: a shape that still tells the two models apart."""
    return replace(TINY, layers=2 if shape.hidden == 2048 else 3)


class Trainer:
    """Weights, their masters and the optimizer's state; `step` is one whole training step."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, is_ours: bool):
        self.shape, self.is_ours = shape, is_ours
        torch.manual_seed(0)
        shapes = [(shape.vocab, shape.hidden)]
        shapes += [each for _ in range(shape.layers) for each in shape.layer_shapes]
        shapes += [(shape.hidden,), (shape.vocab, shape.hidden)]
        self.weights: list[Tensor] = []
        for size in shapes:
            values = torch.ones(size, device=device) if len(size) == 1 else None
            if values is None:
                values = torch.randn(size, device=device) * 0.02
            self.weights.append(torch.nn.Parameter(values.to(dtype)))
        self.masters = [weight.detach().float() for weight in self.weights]
        self.mains = [torch.zeros_like(master) for master in self.masters]
        self.first = [torch.zeros_like(master) for master in self.masters]
        self.second = [torch.zeros_like(master) for master in self.masters]
        self.steps = [torch.zeros((), device=device) for _ in self.masters]
        for weight, main in zip(self.weights, self.mains, strict=True):
            weight.main_grad = main
        self.cos, self.sin = rope_tables(shape.head_dim, shape.seq, device=device)
        self.ids = torch.randint(0, shape.vocab, (shape.tokens,), device=device)
        self.target = torch.randint(0, shape.vocab, (shape.tokens,), device=device)

    def _ours(self) -> Tensor:
        s, (embedding, *layers, norm, head) = self.shape, self.weights
        heads = {"num_q_heads": s.q_heads, "num_kv_heads": s.kv_heads, "head_dim": s.head_dim}
        options = {**heads, "batch": s.batch, "recompute": False}
        if s.batch > 1:
            positions = torch.arange(s.seq, device=self.ids.device)
            options["position_ids"] = positions.repeat(s.batch)
        x = vocab_parallel_embedding(self.ids, embedding)
        residual: Tensor | None = None
        for i in range(0, len(layers), 6):
            norm1, qkv, out, norm2, gate_up, down = layers[i : i + 6]
            if residual is None:
                x, residual = rms_norm(x, norm1, _EPS), x
            else:
                x, residual = rms_norm(x, norm1, _EPS, residual)
            x = tensor_parallel_attention(x, qkv, out, self.cos, self.sin, **options)
            x, residual = rms_norm(x, norm2, _EPS, residual)
            x = tensor_parallel_mlp(x, gate_up, down, recompute=False)
        x, _ = rms_norm(x, norm, _EPS, residual)
        return linear_cross_entropy(x, head, self.target)

    def _torch(self) -> Tensor:
        s, (embedding, *layers, norm, head) = self.shape, self.weights
        positions = torch.arange(s.seq, device=self.ids.device).repeat(s.batch)
        x = F.embedding(self.ids, embedding)
        for i in range(0, len(layers), 6):
            norm1, qkv, out, norm2, gate_up, down = layers[i : i + 6]
            packed = F.linear(rms_norm_reference(x, norm1, _EPS), qkv)
            parts = rope_qkv_reference(
                packed, self.cos, self.sin, s.q_heads, s.kv_heads, s.head_dim, positions
            )
            q, k, v = (part.unflatten(0, (s.batch, s.seq)) for part in parts)
            x = x + F.linear(sdpa(q, k, v).reshape(s.tokens, -1), out)
            gate, up = F.linear(rms_norm_reference(x, norm2, _EPS), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        logits = F.linear(rms_norm_reference(x, norm, _EPS), head)
        return F.cross_entropy(logits.float(), self.target)

    @torch.no_grad()
    def _accumulate(self) -> None:
        """What has no part in `main_grad` yet: all of torch's, and our norms and the head's."""
        for weight in self.weights:
            if weight.grad is not None:
                weight.main_grad.add_(weight.grad)
                weight.grad = None

    @torch.no_grad()
    def _update_ours(self) -> None:
        clip_grad_norm_(self.mains, _MAX_NORM)
        state = (self.masters, self.mains, self.first, self.second, self.steps)
        adamw_step_(*state, betas=_BETAS, copies=[w.detach() for w in self.weights], **_ADAM)

    @torch.no_grad()
    def _update_torch(self) -> None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.mains)))
        torch._foreach_mul_(self.mains, (_MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        torch._foreach_add_(self.steps, 1)
        torch._fused_adamw_(
            self.masters, self.mains, self.first, self.second, [], self.steps,
            beta1=_BETAS[0], beta2=_BETAS[1], amsgrad=False, maximize=False, **_ADAM,
        )  # fmt: skip
        torch._foreach_copy_([w.detach() for w in self.weights], self.masters)

    def step(self) -> Tensor:
        """The loss before it, a number on the device."""
        forward: Callable[[], Tensor] = self._ours if self.is_ours else self._torch
        loss = forward()
        loss.backward()
        self._accumulate()
        (self._update_ours if self.is_ours else self._update_torch)()
        torch._foreach_zero_(self.mains)
        return loss.detach()
