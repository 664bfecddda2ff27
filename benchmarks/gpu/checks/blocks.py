"""The tensor-parallel linears and fused blocks, on one rank, with and without `main_grad`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.harness import Builder, Check, check, precompile

__all__ = ["BUILDERS", "check", "precompile"]

Function = Callable[..., Tensor]
# Several products follow each other, each rounded to the dtype that they are in.
_TOLERANCES = {
    torch.bfloat16: {torch.bfloat16: 2e-2, torch.float32: 2e-2},
    torch.float32: {torch.float32: 1e-4},
}


def _tensors(context: Context, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Activations of unit size, and weights that keep them so."""
    first, *rest = shapes
    dtype = context.dtype(multiplies=True)
    x = torch.randn(first, device=context.device).to(dtype)
    weights = [torch.randn(s, device=context.device) * s[-1] ** -0.5 for s in rest]
    return [x, *(weight.to(dtype) for weight in weights)]


def _group(variant: str, context: Context) -> dict[str, Any]:
    """A real group where the variant wants one, in the mode that scatters."""
    if variant != "a group of one":
        return {}
    import torch.distributed as dist

    backend = "gloo" if context.dry else "nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return {"group": dist.group.WORLD, "mode": "reduce_scatter"}


def _main_grads(function: Function, reference: Function, out_features: int) -> tuple[Any, Any]:
    """Both with gradients of the weights added to fp32 ones that are there already, as large."""

    def gradient(x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(2)
        shape = (x.shape[0], out_features)
        return torch.randn(shape, generator=generator, device=x.device).bfloat16().to(x.dtype)

    def earlier(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        generator = torch.Generator(x.device).manual_seed(3)
        size = x.shape[0] ** 0.5
        return [
            torch.randn(weight.shape, generator=generator, device=x.device) * size
            for weight in weights
        ]

    def ours(x: Tensor, *weights: Tensor) -> list[Tensor]:
        params = [torch.nn.Parameter(weight.clone()) for weight in weights]
        for param, main in zip(params, earlier(x, weights), strict=True):
            param.main_grad = main
        leaf = x.clone().requires_grad_()
        y = function(leaf, *params)
        y.backward(gradient(x))
        if any(param.grad is not None for param in params):
            raise AssertionError("a weight with main_grad has a gradient of its own too")
        assert leaf.grad is not None
        return [y.detach(), leaf.grad, *(param.main_grad for param in params)]

    def wide(x: Tensor, *weights: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, *weights)]
        y = reference(*leaves)
        dx, *rest = torch.autograd.grad(y, leaves, gradient(x))
        mains = earlier(x, weights)
        return [y.detach(), dx, *(a + b for a, b in zip(mains, rest, strict=True))]

    return ours, wide


def _check(
    variant: str, tensors: list[Tensor], ours: Function, reference: Function, path: str = ""
) -> Check:
    dtype = tensors[0].dtype
    if variant.startswith("main_grad"):
        out_features = reference(*tensors).shape[1]
        functions = _main_grads(ours, reference, out_features)
        return Check(tensors, *functions, tolerances=_TOLERANCES[dtype], path=path)
    leaves = [t.requires_grad_() for t in tensors]
    return Check(leaves, ours, reference, tolerances=_TOLERANCES[dtype], path=path)


def _choose(product: str) -> None:
    """Whether blocks take the products that are fused with what follows them."""
    from nanotron_fast.kernels.matmul.choice import ENVIRONMENT_VARIABLE

    os.environ[ENVIRONMENT_VARIABLE] = product


def _linear(name: str) -> Builder:
    def build(variant: str, context: Context) -> Check:
        from nanotron_fast.parallel import linear

        function: Function = getattr(linear, name)
        tokens, hidden, out = (6, 24, 40) if context.dry else (4096, 4096, 6144)
        options = _group(variant, context)
        tensors = _tensors(context, (tokens, hidden), (out, hidden))
        if "bias" in variant:
            tensors += [torch.randn(out, device=context.device).to(tensors[0].dtype)]

        def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return function(x, weight, bias, **options)

        # The vendor's product is the path: there is no kernel of ours in a linear.
        return _check(variant, tensors, ours, F.linear, "torch")

    return build


def _mlp(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.glu import glu_reference
    from nanotron_fast.parallel import tensor_parallel_mlp

    _choose("always" if variant == "fused" else "never")
    tokens, hidden, inter = (10, 32, 48) if context.dry else (4096, 4096, 14336)
    options = _group(variant, context)
    options["recompute"] = variant != "unfused"
    tensors = _tensors(context, (tokens, hidden), (2 * inter, hidden), (hidden, inter))
    return _check(
        variant,
        tensors,
        lambda x, gate_up, down: tensor_parallel_mlp(x, gate_up, down, **options),
        lambda x, gate_up, down: F.linear(glu_reference(F.linear(x, gate_up)), down),
    )


def _attention(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.attention import attention_reference
    from nanotron_fast.kernels.rope import rope_qkv_reference, rope_tables
    from nanotron_fast.parallel import tensor_parallel_attention

    _choose("always" if variant == "fused" else "never")
    tokens, hidden, *heads = (12, 32, 2, 1, 16) if context.dry else (2048, 4096, 32, 8, 128)
    q_heads, kv_heads, head_dim = heads
    cos, sin = rope_tables(head_dim, tokens, device=context.device)
    named = {"num_q_heads": q_heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    options = _group(variant, context) | named
    options["recompute"] = variant != "unfused"
    positions, cu_seqlens = None, None
    if variant == "documents":
        ends = [0, tokens // 4, tokens // 4, tokens]
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=context.device)
        lengths = cu_seqlens.diff().tolist()
        positions = torch.cat([torch.arange(n, device=context.device) for n in lengths])
    packed = (q_heads + 2 * kv_heads) * head_dim
    shapes = ((tokens, hidden), (packed, hidden), (hidden, q_heads * head_dim))

    def reference(x: Tensor, weight: Tensor, o_weight: Tensor) -> Tensor:
        tables = (cos.double(), sin.double()) if x.dtype == torch.float64 else (cos, sin)
        q, k, v = rope_qkv_reference(F.linear(x, weight), *tables, *heads, positions)
        if cu_seqlens is None:
            out = attention_reference(q[None], k[None], v[None])
        else:
            out = attention_reference(q, k, v, cu_seqlens=cu_seqlens)
        return F.linear(out.reshape(tokens, -1), o_weight)

    def ours(x: Tensor, weight: Tensor, o_weight: Tensor) -> Tensor:
        return tensor_parallel_attention(
            x, weight, o_weight, cos, sin, cu_seqlens=cu_seqlens, **options
        )

    return _check(variant, _tensors(context, *shapes), ours, reference)


BUILDERS: dict[str, Builder] = {
    "column_linear": _linear("column_linear"),
    "row_linear": _linear("row_linear"),
    "mlp_block": _mlp,
    "attention_block": _attention,
}
