"""What stands in for methods and functions of transformers' Llama, Qwen2 and Mistral.

Each replacement looks at every call whether it is what our operation serves, and calls what it
replaces where it is not: a model may be changed after it was enabled.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy
from nanotron_fast.kernels.glu import glu_backward, glu_forward
from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.kernels.rope.apart import rope_apart
from nanotron_fast.kernels.runtime.once import once_differentiable
from nanotron_fast.patch.hooks import why_not_past

# transformers' activations that are one of ours, by the name of their class.
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}
_HOMES_OF_ACTIVATIONS = ("transformers.activations", nn.SiLU.__module__)


def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """`LlamaRMSNorm.forward`, rounded once. A weight of another dtype is left to the original."""
    if self.weight.dtype != hidden_states.dtype:
        # The result has the wider of the two dtypes.
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    """`apply_rotary_pos_emb`: q and k (batch, heads, seq, d), cos and sin (1 or batch, seq, d)."""

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        batch, _, seq, head_dim = q.shape
        is_served = (
            not args
            and not kwargs
            and cos.shape == sin.shape
            and cos.shape in ((1, seq, head_dim), (batch, seq, head_dim))
            and k.dtype == q.dtype
            # transformers widens q and k to the tables' dtype. Autocast takes them back.
            and (
                torch.promote_types(q.dtype, cos.dtype) == q.dtype
                or torch.is_autocast_enabled(q.device.type)
            )
        )
        if not is_served:
            return original(q, k, cos, sin, *args, **kwargs)
        # The two halves of a row of the tables are the same. One row for each token: their copies
        # for the other sequences of a batch are 1 / (heads + key heads) of what is turned.
        cos, sin = (
            x[..., : head_dim // 2].expand(batch, -1, -1).reshape(batch * seq, -1)
            for x in (cos, sin)
        )
        rows, kv = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
        rows, kv = rope_apart(rows, kv[:, None], cos, sin)
        turned_q, turned_k = (x.view(batch, seq, -1, head_dim).transpose(1, 2) for x in (rows, kv))
        return turned_q, turned_k

    return apply_rotary_pos_emb


def with_global(function: types.FunctionType, name: str, value: Any) -> types.FunctionType:
    """A copy of a function in which one global name means something else.

    The function may be decorated: its decorators are copied with it. The copy has the globals of
    this moment; later assignments to its module's names do not reach it.

    Raises LookupError where the function does not use the name, or a decorator hides it.
    """
    scope, closure = function.__globals__, function.__closure__ or ()
    inner = function.__dict__.get("__wrapped__")
    if inner is None:
        if name not in function.__code__.co_names or name not in scope:
            raise LookupError(f"{function.__qualname__} does not call {name}")
        scope = {**scope, name: value}
    elif not isinstance(inner, types.FunctionType) or not any(
        cell.cell_contents is inner for cell in closure
    ):
        raise LookupError(f"{function.__qualname__} is decorated in an unknown way")
    else:
        changed = with_global(inner, name, value)
        closure = tuple(
            types.CellType(changed) if cell.cell_contents is inner else cell for cell in closure
        )
    code, defaults = function.__code__, function.__defaults__
    copy = types.FunctionType(code, scope, function.__name__, defaults, closure or None)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    copy.__doc__ = function.__doc__
    copy.__dict__.update(function.__dict__)
    if inner is not None:
        copy.__dict__["__wrapped__"] = changed
    return copy


class _GatedProducts(torch.autograd.Function):
    """act(x @ gate^T) * (x @ up^T); x (tokens, hidden), weights (inter, hidden), one dtype.

    Both products are written into the halves of one (tokens, 2 * inter) tensor. Kept: it, x, the
    weights and the biases.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        activation: str,
    ) -> Tensor:
        packed = x.new_empty(len(x), 2 * len(gate))
        rows = zip(packed.chunk(2, dim=1), (gate, up), (gate_bias, up_bias), strict=True)
        for half, weight, bias in rows:
            if bias is None:
                torch.mm(x, weight.t(), out=half)
            else:
                torch.addmm(bias, x, weight.t(), out=half)
        ctx.save_for_backward(x, gate, up, packed, gate_bias, up_bias)
        ctx.activation = activation
        return glu_forward(packed, activation)

    @staticmethod
    @once_differentiable("the gated products of an MLP")
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, packed, *_ = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_gate, d_up = glu_backward(dh, packed, ctx.activation).chunk(2, dim=1)
        dx = torch.addmm(d_gate @ gate, d_up, up) if wanted[0] else None
        return (
            dx,
            d_gate.t() @ x if wanted[1] else None,
            d_up.t() @ x if wanted[2] else None,
            d_gate.sum(0) if wanted[3] else None,
            d_up.sum(0) if wanted[4] else None,
            None,
        )


def why_no_gated_products(mlp: Any) -> str:
    """Why an MLP's gate and up projections cannot be taken together; empty where they can."""
    gate, up, act = mlp.gate_proj, mlp.up_proj, mlp.act_fn
    for name, linear in (("gate_proj", gate), ("up_proj", up)):
        if type(linear) is not nn.Linear:
            return f"its {name} is a {type(linear).__name__}, not a plain nn.Linear"
        if type(linear.weight) is not nn.Parameter:
            return f"the weight of its {name} is a {type(linear.weight).__name__}"
    if gate.weight.shape != up.weight.shape:
        return f"gate {tuple(gate.weight.shape)} and up {tuple(up.weight.shape)} differ"
    if len({(p.dtype, p.device) for part in (gate, up) for p in part.parameters()}) != 1:
        return "its gate_proj and up_proj have several dtypes or devices"
    known = type(act).__name__ in _ACTIVATIONS and type(act).__module__ in _HOMES_OF_ACTIVATIONS
    if not known:
        return f"its activation is a {type(act).__name__}"
    for name, part in (("gate_proj", gate), ("up_proj", up), ("act_fn", act)):
        if reason := why_not_past(part):
            return f"its {name}: {reason}"
    return ""


def _operands(x: Tensor, mlp: Any) -> list[Tensor | None]:
    """x, the weights and the biases, as autocast would hand them to a product."""
    gate, up = mlp.gate_proj, mlp.up_proj
    operands = [x, gate.weight, up.weight, gate.bias, up.bias]
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        operands = [each if each is None else each.to(dtype) for each in operands]
    return operands


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """`LlamaMLP.forward`: gate and up packed, and the gated unit in one pass over them.

    Under torch.compile it is the original, whose gated unit the compiler fuses by itself.
    """
    if torch.compiler.is_compiling() or x.dim() < 2 or why_no_gated_products(self):
        return type(self).forward(self, x)
    rows, *rest = _operands(x, self)
    assert rows is not None
    if any(each is not None and each.dtype != rows.dtype for each in rest):
        return type(self).forward(self, x)
    activation = _ACTIVATIONS[type(self.act_fn).__name__]
    h = _GatedProducts.apply(rows.reshape(-1, rows.shape[-1]), *rest, activation)
    return self.down_proj(h.view(*x.shape[:-1], h.shape[-1]))


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`ForCausalLMLoss` without its fp32 copy of the logits; they are left as they are.

    Logits (batch, seq, vocab) of any dtype, labels (batch, seq); the loss is fp32: the mean over
    the tokens that count, or their sum by num_items_in_batch. A label that is neither in the
    vocabulary nor ignore_index fails as torch's own cross entropy does: on a GPU, by an assertion
    on the device.
    """
    if shift_labels is None:
        assert labels is not None
        # A token is predicted from those before it. What follows the last one is not known.
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    counts = target != ignore_index
    in_vocabulary = (target >= 0) & (target < vocab_size)
    torch._assert_async((in_vocabulary | ~counts).all(), "a label is outside the vocabulary")
    rows = logits.reshape(-1, vocab_size)
    losses = vocab_parallel_cross_entropy(rows, target, ignore_index=ignore_index, inplace=False)
    assert isinstance(losses, Tensor)
    if num_items_in_batch is None:
        return losses.sum() / counts.sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch
