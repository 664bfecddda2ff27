"""One small case of every operation, for the tests that ask the same of each.

A case makes its tensors on a device and says how to call the operation on them. Operations that
write in place return what they wrote; `run` gives outputs, then gradients, as one list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy
from nanotron_fast.kernels.embedding import vocab_parallel_embedding
from nanotron_fast.kernels.glu import glu
from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy
from nanotron_fast.kernels.optimizer import accumulate_, adamw_step_, clip_grad_norm_
from nanotron_fast.kernels.pack import pack_qkv
from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.kernels.rope import rope_qkv, rope_tables
from nanotron_fast.kernels.rope.apart import rope_apart
from nanotron_fast.kernels.rope.normed import rope_normed
from nanotron_fast.parallel import (
    column_linear,
    row_linear,
    tensor_parallel_attention,
    tensor_parallel_mlp,
)

Call = Callable[..., Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Operation:
    """`call` takes what `make` gives for a device; what requires a gradient is given one."""

    name: str
    make: Callable[[torch.device], list[Tensor]]
    call: Call
    # Whether a Triton kernel runs in it, rather than torch's own product.
    has_kernel: bool = True


def _random(*shapes: tuple[int, ...], grad: bool = True) -> Callable[[torch.device], list[Tensor]]:
    def make(device: torch.device) -> list[Tensor]:
        torch.manual_seed(0)
        made = [(torch.randn(shape) * 0.3).to(device) for shape in shapes]
        return [tensor.requires_grad_(grad) for tensor in made]

    return make


def _with_tables(head_dim: int, tokens: int, *shapes: tuple[int, ...]):
    def make(device: torch.device) -> list[Tensor]:
        tables = rope_tables(head_dim, tokens)
        return [*_random(*shapes)(device), *(table.to(device) for table in tables)]

    return make


def _with_ids(high: int, ignored: int | None, *shapes: tuple[int, ...]):
    def make(device: torch.device) -> list[Tensor]:
        tensors = _random(*shapes)(device)
        ids = torch.randint(high, (24,))
        if ignored is not None:
            ids[3] = ignored
        return [*tensors, ids.to(device)]

    return make


def _adamw(param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor) -> list[Tensor]:
    adamw_step_([param], [grad], [mean], [square], step, lr=1e-2)
    return [param, mean, square, step]


def _make_adamw(device: torch.device) -> list[Tensor]:
    param, grad, mean, square = _random(*[(70, 9)] * 4, grad=False)(device)
    return [param, grad, mean, square.square(), torch.zeros((), device=device)]


def _accumulate(main: Tensor, grad: Tensor) -> Tensor:
    accumulate_([main], [grad], 0.5)
    return main


def _clip(first: Tensor, second: Tensor) -> list[Tensor]:
    return [clip_grad_norm_([first, second], 0.1), first, second]


_HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
OPERATIONS = (
    Operation(
        "rms_norm",
        _random((24, 96), (96,), (24, 96)),
        lambda x, weight, residual: rms_norm(x, weight, 1e-6, residual),
    ),
    Operation("glu", _random((24, 96)), glu),
    Operation(
        "rope_qkv",
        _with_tables(16, 24, (24, 8 * 16)),
        lambda qkv, cos, sin: rope_qkv(qkv, cos, sin, 4, 2, 16),
    ),
    Operation("rope_apart", _with_tables(16, 24, (24, 4, 16), (24, 2, 2, 16)), rope_apart),
    Operation(
        "rope_normed",
        _with_tables(16, 24, (24, 4, 16), (24, 2, 16), (16,), (16,)),
        rope_normed,
    ),
    Operation(
        "attention",
        _random((1, 24, 4, 16), (1, 24, 2, 16), (1, 24, 2, 16)),
        # Never the vendor's: the kernels are meant.
        lambda q, k, v: attention(q, k, v, window=9),
    ),
    Operation(
        "cross_entropy",
        _with_ids(96, -100, (24, 96)),
        lambda logits, target: vocab_parallel_cross_entropy(
            logits * 1, target, ignore_index=-100, z_loss=1e-2
        ),
    ),
    Operation(
        "linear_cross_entropy",
        _with_ids(96, -100, (24, 32), (96, 32)),
        lambda hidden, weight, target: linear_cross_entropy(
            hidden, weight, target, ignore_index=-100
        ),
    ),
    Operation(
        "embedding",
        _with_ids(96, None, (96, 32)),
        lambda weight, ids: vocab_parallel_embedding(ids, weight),
    ),
    Operation("adamw", _make_adamw, _adamw),
    Operation("accumulate", _random((70, 9), (70, 9), grad=False), _accumulate),
    Operation("clip", _random((70, 9), (33,), grad=False), _clip),
    Operation(
        "pack",
        _random((32, 12), (16, 12), (16, 12), grad=False),
        lambda q, k, v: pack_qkv(q, k, v, 2),
    ),
    Operation("column_linear", _random((24, 32), (48, 32), (48,)), column_linear, False),
    Operation("row_linear", _random((24, 32), (48, 32), (48,)), row_linear, False),
    Operation(
        "mlp_block",
        _random((24, 32), (96, 32), (32, 48)),
        tensor_parallel_mlp,
    ),
    Operation(
        "attention_block",
        _with_tables(16, 24, (24, 32), (128, 32), (32, 64)),
        lambda *tensors: tensor_parallel_attention(*tensors, **_HEADS),
    ),
)


def run(call: Call, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of a fixed weighting of them."""
    out = call(*tensors)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    roots = [tensor for tensor in outputs if tensor.requires_grad]
    if not leaves:
        return outputs
    weights = [
        torch.linspace(-1, 1, root.numel(), device=root.device).view(root.shape) for root in roots
    ]
    return [*outputs, *torch.autograd.grad(roots, leaves, weights)]
