"""Cross entropy, by itself and behind the head's product, and the embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Setting

_LIGER = "liger_kernel.transformers.functional"


def cross_entropy_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy

    for tokens, vocab in setting.pick([(8192, 131072), (8192, 32000)], [(4, 200)], [(256, 8192)]):
        target = torch.randint(0, vocab, (tokens,), device=setting.device)

        # Not a leaf, as behind the head's product: over a leaf the gradient is not written.
        def tensors(tokens: int = tokens, vocab: int = vocab) -> list[Tensor]:
            return [setting.randn(tokens, vocab) * 1]

        def torch_loss(x: Tensor, target: Tensor = target) -> Tensor:
            return F.cross_entropy(x.float(), target, reduction="none")

        case = Case(
            "cross_entropy",
            f"{tokens}x{vocab}",
            tensors,
            {
                "torch": torch_loss,
                "torch.compile": setting.compile(torch_loss),
                "ours": lambda x, t=target: vocab_parallel_cross_entropy(x, t),
            },
            bytes_forward=tokens * vocab * setting.dtype.itemsize,
            bytes_backward=2 * tokens * vocab * setting.dtype.itemsize,
            is_joint=True,
        )
        case.add_peer(
            "liger", _LIGER, "liger_cross_entropy", lambda f, x, t=target: f(x, t, reduction="none")
        )
        yield case.add_peer(
            "quack", "quack", "cross_entropy", lambda f, x, t=target: f(x, t, reduction="none")
        )


class _Products(torch.autograd.Function):
    """The three products of the head and nothing else: what no loss can be faster than."""

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        logits = x @ weight.t()
        ctx.save_for_backward(x, weight, logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        x, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ x


def linear_cross_entropy_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy

    real = [(4096, 4096, 131072), (8192, 4096, 32000)]
    # So many tokens that they are taken in chunks.
    swept = [(16384, 4096, 131072)]
    for tokens, hidden, vocab in setting.pick(real, [(4, 16, 200)], [(256, 256, 4096)], swept):
        target = torch.randint(0, vocab, (tokens,), device=setting.device)

        def tensors(tokens: int = tokens, hidden: int = hidden, vocab: int = vocab) -> list[Tensor]:
            weight = setting.randn(vocab, hidden, scale=hidden**-0.5)
            return [setting.randn(tokens, hidden), weight]

        def torch_loss(x: Tensor, weight: Tensor, target: Tensor = target) -> Tensor:
            return F.cross_entropy((x @ weight.t()).float(), target)

        flops = 2 * tokens * hidden * vocab
        case = Case(
            "linear_cross_entropy",
            f"{tokens}x{hidden}x{vocab}",
            tensors,
            {
                "torch": torch_loss,
                "torch.compile": setting.compile(torch_loss),
                "bare products": _Products.apply,
                "ours": lambda x, w, t=target: linear_cross_entropy(x, w, t),
            },
            flops_forward=flops,
            flops_backward=2 * flops,
            is_joint=True,
            unlike=("bare products",),
        )
        yield case.add_peer(
            "liger",
            _LIGER,
            "liger_fused_linear_cross_entropy",
            lambda f, x, w, t=target: f(x, w, t),
        )


def embedding_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.embedding import vocab_parallel_embedding

    real = [(16384, 128256, 4096), (16384, 32000, 4096)]
    swept = [(16384, 32000, hidden) for hidden in (4096, 2048, 8192)]
    for tokens, vocab, hidden in setting.pick(real, [(6, 30, 24)], [(512, 4096, 256)], swept):
        ids = torch.randint(0, vocab, (tokens,), device=setting.device)

        def tensors(vocab: int = vocab, hidden: int = hidden) -> list[Tensor]:
            return [setting.randn(vocab, hidden)]

        item = setting.dtype.itemsize
        yield Case(
            "embedding",
            f"{tokens} of {vocab}x{hidden}",
            tensors,
            {
                "torch": lambda w, ids=ids: F.embedding(ids, w),
                "torch.compile": setting.compile(lambda w, ids=ids: F.embedding(ids, w)),
                "ours": lambda w, ids=ids: vocab_parallel_embedding(ids, w),
            },
            bytes_forward=2 * tokens * hidden * item,
            # The gradient of every row is written, that of most rows as zeros.
            bytes_backward=(tokens + vocab) * hidden * item,
        )
