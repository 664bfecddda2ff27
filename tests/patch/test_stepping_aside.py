"""Where a module has hooks or a forward of its own, no operation of ours goes past it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanotron_fast.patch.hooks import may_go_past
from nanotron_fast.patch.nanotron.replacements import attention, loss, mlp, norm
from nanotron_fast.patch.nanotron.targets import DropInOptions


class SiLUActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x)


def own_forward(module: nn.Module, seen: list[Any]) -> None:
    stock = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return stock(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


# Each way to watch a module.
WAYS: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "forward hook": lambda m, seen: m.register_forward_hook(lambda _, i, o: seen.append((i, o))),
    "pre-hook": lambda m, seen: m.register_forward_pre_hook(lambda _, i: seen.append(i)),
    "backward hook": lambda m, seen: m.register_full_backward_hook(
        lambda _, i, o: seen.append((i, o))
    ),
    "backward pre-hook": lambda m, seen: m.register_full_backward_pre_hook(
        lambda _, o: seen.append(o)
    ),
    "own forward": own_forward,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_watches_a_module_is_seen_and_its_end_too(way: str) -> None:
    module = SiLUActivation()
    assert may_go_past(module)
    handle = WAYS[way](module, [])
    assert not may_go_past(module)
    if handle is not None:
        handle.remove()
        assert may_go_past(module)


def test_hooks_of_all_modules() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not may_go_past(SiLUActivation())
    handle.remove()
    assert may_go_past(SiLUActivation(), lambda x: x)


@pytest.mark.parametrize("way", WAYS)
def test_an_activation(way: str) -> None:
    class GLUActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = SiLUActivation()

        def forward(self, merged_states: Tensor) -> Tensor:
            gate, up = merged_states.chunk(2, -1)
            return self.act(gate) * up

    class Qwen2MLP(GLUActivation):
        gate_up_proj = down_proj = staticmethod(lambda x: x)

        def forward(self, hidden_states: Tensor) -> dict[str, Tensor]:
            return {"hidden_states": super().forward(hidden_states)}

    x = torch.randn(3, 8, requires_grad=True)
    for kind, factory in ((GLUActivation, mlp.glu_activation), (Qwen2MLP, mlp.qwen2_mlp)):
        module, seen = kind(), []  # type: ignore[var-annotated]
        forward = factory(kind.forward, DropInOptions())
        expected = module.forward(x)
        WAYS[way](module.act, seen)
        found = forward(module, x)
        if isinstance(found, dict):
            found, expected = found["hidden_states"], expected["hidden_states"]
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        assert len(seen) == 1, kind


class Norm(nn.Module):
    """A stand-in of Nanotron's: our replacement is its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))
        self.eps = 1e-6

    forward = norm.llama_rms_norm(None, DropInOptions())  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
def test_a_norm_after_attention_sees_the_sum_and_gives_one_tensor(way: str) -> None:
    module, seen = Norm(), []  # type: ignore[var-annotated]
    x, residual = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    expected = norm._add_and_norm(module, x, residual)
    WAYS[way](module, seen)
    y, h = norm._add_and_norm(module, x, residual)
    torch.testing.assert_close((y, h), expected)
    (y + h).sum().backward()
    if way in ("pre-hook", "own forward"):
        assert [len(each) for each in seen] == [1]
        torch.testing.assert_close(seen[0][0], x + residual)
    elif way == "forward hook":
        ((inputs, output),) = seen
        torch.testing.assert_close(inputs, (x + residual,))
        torch.testing.assert_close(output, y)
    else:
        assert len(seen) == 1


@pytest.mark.parametrize("way", WAYS)
def test_the_cast_of_the_logits(way: str) -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"output": x.float()}

    class LlamaModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cast_to_fp32 = Cast()
            self.lm_head = SimpleNamespace(rank=0)
            self.cast_to_fp32.rank = 0

    def original(self: Any, x: Tensor) -> Tensor:
        return self.cast_to_fp32(x=x)["output"]

    def ours() -> None: ...

    setattr(ours, loss._TAKES_ANY, True)
    scope = {"sharded_cross_entropy": ours}
    original = type(original)(original.__code__, scope)
    forward, model = loss.without_cast(original, DropInOptions()), LlamaModel()
    x = torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    assert forward(model, x).dtype == torch.bfloat16
    seen: list[Any] = []
    WAYS[way](model.cast_to_fp32, seen)
    out = forward(model, x)
    assert out.dtype == torch.float32
    if way in ("forward hook", "pre-hook", "own forward"):
        assert len(seen) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_rotary_embedding(way: str) -> None:
    """Its attention is the original's then, and refuses a scaling that only ours would honour."""
    calls: list[str] = []

    def original(*args: Any) -> str:
        calls.append("original")
        return "stock"

    rotary = nn.Identity()
    WAYS[way](rotary, [])
    llama = SimpleNamespace(flash_rotary_embedding=rotary, get_local_store=lambda: None)
    assert attention.llama_forward(original, DropInOptions())(llama, None, None) == "stock"
    config = SimpleNamespace(rope_scaling={"rope_type": "linear", "factor": 2.0})
    qwen2 = SimpleNamespace(rotary_emb=rotary, config=config)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    arguments = (qwen2, None, 4, None, starts)
    assert attention.qwen2_forward(original, DropInOptions())(*arguments) == "stock"
    assert calls == ["original"] * 2
    with pytest.raises(NotImplementedError, match="has hooks or a forward of its own"):
        attention.qwen2_forward(original, DropInOptions(rope_scaling=True))(*arguments)


def test_a_watched_core_attention_sees_nanotrons_shapes() -> None:
    """(batch * seq, heads, d), and not the batch that ours passes between themselves."""

    class CoreAttention(nn.Module):
        forward = attention.core_attention(None, DropInOptions())  # type: ignore[arg-type]

    class Rotary(nn.Module):
        base, interleaved = 10000.0, False

    core, seen = CoreAttention(), []  # type: ignore[var-annotated]
    llama = SimpleNamespace(
        flash_rotary_embedding=Rotary(),
        get_local_store=lambda: None,
        qkv_proj=lambda x: x,
        o_proj=lambda x: x,
        attention=core,
        d_qk=8,
        d_v=8,
        n_local_q_heads=2,
        n_local_kv_heads=1,
    )
    forward = attention.llama_forward(None, DropInOptions())  # type: ignore[arg-type]
    arguments = (torch.randn(5, 3, 32), torch.ones(3, 5, dtype=torch.bool))
    expected = forward(llama, *arguments)["hidden_states"]
    core.register_forward_hook(
        lambda _, i, kwargs, out: seen.append((kwargs["query_states"], out)), with_kwargs=True
    )
    torch.testing.assert_close(forward(llama, *arguments)["hidden_states"], expected)
    assert [tuple(x.shape) for x in seen[0]] == [(15, 2, 8)] * 2
