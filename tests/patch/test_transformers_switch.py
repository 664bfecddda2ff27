"""Our operations under transformers' models: on and off, and what is refused or left alone."""

from __future__ import annotations

import copy
import io
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nanotron_fast
from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.patch.transformers import forwards as forwards
from nanotron_fast.patch.transformers.models import disable_transformers, enable_transformers
from tests.patch.test_transformers_models import ALL_TAKEN, DEVICE, assert_same, make, step, tokens

transformers = pytest.importorskip("transformers")


def contents(model: nn.Module) -> dict[tuple[str, str], int]:
    """Everything that lies in the modules' own dicts, by identity."""
    return {
        (name, key): id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def test_everything_is_put_back() -> None:
    model, other = make(), make()
    home = sys.modules[type(model).__module__]
    norm = model.model.layers[0].input_layernorm
    # As transformers 4 leaves it, where it has recorded hidden states.
    norm.forward = norm.forward
    model.loss_function = their = model.loss_function
    before, others, globals_before = contents(model), contents(other), {**vars(home)}
    classes = {
        name: {**vars(value)} for name, value in globals_before.items() if name[:5] == "Llama"
    }
    assert enable_transformers(model).replaced == ALL_TAKEN
    assert contents(model) != before
    assert contents(other) == others
    assert vars(home) == globals_before
    assert classes == {
        name: {**vars(value)} for name, value in vars(home).items() if name in classes
    }
    again = enable_transformers(model)
    assert (again.replaced, again.left) == (ALL_TAKEN, [])
    disable_transformers(model)
    assert contents(model) == before
    assert model.loss_function is their
    disable_transformers(model)
    assert contents(model) == before
    enable_transformers(model, ())
    assert contents(model).keys() - before.keys() == {("", "_nanotron_fast_replaced")}


def test_recorded_hidden_states() -> None:
    """transformers 4 assigns forwards while it records, transformers 5 uses hooks."""
    model = make()
    options = {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    theirs = model(tokens(), **options)
    enable_transformers(model)
    assert enable_transformers(model).left == []
    ours = model(tokens(), **options)
    for name in ("hidden_states", "attentions"):
        assert len(getattr(ours, name)) == len(getattr(theirs, name)) > 0
        for mine, each in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(mine, each, rtol=1e-5, atol=1e-5)
    disable_transformers(model)
    assert torch.equal(model(tokens()).logits, theirs.logits)


def test_a_copy_has_its_own() -> None:
    model = make()
    theirs = step(model)
    enable_transformers(model)
    other = copy.deepcopy(model)
    disable_transformers(model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert_same(step(other), theirs)
    assert other.model.norm.forward.__self__ is other.model.norm
    disable_transformers(other)
    assert "forward" not in vars(other.model.norm)
    assert all(torch.equal(value, theirs[name]) for name, value in step(other).items())


def test_a_pickled_one_is_transformers_own() -> None:
    """Methods are pickled by name: what comes back has those of its class, and takes ours anew."""
    model = make()
    theirs = step(model)
    enable_transformers(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert enable_transformers(other).replaced == ALL_TAKEN
    assert_same(step(other), theirs)
    disable_transformers(other)
    assert "forward" not in vars(other.model.norm)
    assert all(torch.equal(value, theirs[name]) for name, value in step(other).items())


def test_without_a_head() -> None:
    body = make().model
    expected = body(tokens()).last_hidden_state
    report = enable_transformers(body)
    assert report.replaced == {**ALL_TAKEN, "cross_entropy": 0}
    assert [(each.op, each.module) for each in report.left] == [("cross_entropy", "")]
    torch.testing.assert_close(body(tokens()).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_exports() -> None:
    assert nanotron_fast.enable_transformers is enable_transformers
    assert nanotron_fast.disable_transformers is disable_transformers


# --- What is refused


@pytest.mark.parametrize(
    ("ops", "words"),
    [({"rope", "nope"}, "unknown operations nope: choose from rms_norm, rope"), ("rope", "'rope'")],
)
def test_unknown_operations(ops: Any, words: str) -> None:
    model = make()
    before = contents(model)
    with pytest.raises(ConfigError, match=words):
        enable_transformers(model, ops)
    assert contents(model) == before


def test_other_models() -> None:
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)
    for model, name in (
        (transformers.GPT2LMHeadModel(config), "GPT2LMHeadModel"),
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (nn.Sequential(make()), "Sequential"),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"Llama, Qwen2, Mistral, not a .*{name}$"):
            enable_transformers(model)


class Adapted(nn.Linear):
    """What PEFT makes of a linear layer: its forward is not that of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def adapt(model: Any) -> None:
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = Adapted(48, 40, device=DEVICE)
    model.model.layers[1].mlp.up_proj.load_state_dict(old.state_dict())


def hook(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *args: args[2] + 1)


def double(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj.to(torch.float64)


def replace(model: Any) -> None:
    proj = model.model.layers[1].mlp.gate_proj
    proj.forward = lambda x: 3 * nn.functional.linear(x, proj.weight, proj.bias)


def activate(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def swap_norm(model: Any) -> None:
    model.model.norm = nn.RMSNorm(48, device=DEVICE)


def wrap_norm(model: Any) -> None:
    norm = model.model.norm
    original = norm.forward
    norm.forward = lambda x: 2 * original(x)


def bind_norm(model: Any) -> None:
    """As Liger-Kernel does."""
    model.model.norm.forward = types.MethodType(lambda self, x: self.weight * x, model.model.norm)


def masked_loss(model: Any) -> None:
    from transformers.loss.loss_utils import ForMaskedLMLoss

    model.loss_function = ForMaskedLMLoss


def lose(model: Any) -> None:
    model.loss_function = lambda logits, **_: logits.float().square().mean()


@pytest.mark.parametrize(
    ("change", "op", "module", "words"),
    [
        (adapt, "glu", "model.layers.1.mlp", "its up_proj is a Adapted"),
        (hook, "glu", "model.layers.1.mlp", "its gate_proj: it has hooks"),
        (double, "glu", "model.layers.1.mlp", "several dtypes"),
        (replace, "glu", "model.layers.1.mlp", "its gate_proj: its forward was replaced"),
        (activate, "glu", "model.layers.1.mlp", "activation is a ReLU"),
        (swap_norm, "rms_norm", "model.norm", "is a torch.nn.modules.normalization.RMSNorm"),
        (wrap_norm, "rms_norm", "model.norm", "its forward was replaced"),
        (bind_norm, "rms_norm", "model.norm", "its forward was replaced"),
        (masked_loss, "cross_entropy", "", "loss_function is transformers.loss.loss_utils.ForMask"),
        (lose, "cross_entropy", "", "its loss_function is"),
    ],
)
def test_left_alone(change: Callable[[Any], None], op: str, module: str, words: str) -> None:
    model = make()
    change(model)
    theirs = step(model) if change is not double else {}
    before = contents(model)
    report = enable_transformers(model)
    assert report.replaced == {**ALL_TAKEN, op: ALL_TAKEN[op] - 1}
    assert [(each.op, each.module) for each in report.left] == [(op, module)]
    assert words in report.left[0].reason
    if theirs:
        assert_same(step(model), theirs)
    disable_transformers(model)
    assert contents(model) == before


@pytest.mark.parametrize("change", [adapt, hook, replace, activate])
def test_changed_after_it_was_enabled(change: Callable[[Any], None]) -> None:
    """A forward of ours looks again at what it bypasses."""
    model = make()
    plain = step(model)["logits"]
    enable_transformers(model)
    change(model)
    found = step(model)
    disable_transformers(model)
    assert_same(found, step(model))
    assert not torch.allclose(found["logits"], plain, rtol=1e-2)


def test_norm_of_another_dtype_is_the_originals() -> None:
    model = make(dtype=torch.bfloat16)
    model.model.norm.float()
    model.lm_head.float()
    theirs = model(tokens()).logits
    enable_transformers(model, {"rms_norm"})
    assert model(tokens()).logits.dtype == theirs.dtype == torch.float32


@pytest.fixture
def llama() -> Iterator[Any]:
    """transformers' module, which is put back."""
    home = sys.modules[type(make()).__module__]
    norm, turn = home.LlamaRMSNorm.forward, home.apply_rotary_pos_emb
    yield home
    home.LlamaRMSNorm.forward, home.apply_rotary_pos_emb = norm, turn


def test_somebody_else_was_first(llama: Any) -> None:
    llama.LlamaRMSNorm.forward = lambda self, x: x
    llama.apply_rotary_pos_emb = lambda q, k, cos, sin: (q * cos[:, None], k * cos[:, None])
    model = make()
    theirs = model(tokens()).logits
    report = enable_transformers(model)
    assert report.replaced == {**ALL_TAKEN, "rms_norm": 0, "rope": 0}
    reasons = {each.op: each.reason for each in report.left}
    assert reasons["rms_norm"] == "LlamaRMSNorm.forward was replaced by somebody else"
    assert reasons["rope"].endswith("apply_rotary_pos_emb was replaced by somebody else")
    assert_same({"logits": model(tokens()).logits}, {"logits": theirs})


def test_somebody_else_came_after(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    enable_transformers(model)
    wrap_norm(model)
    theirs = model.model.norm.forward
    disable_transformers(model)
    assert model.model.norm.forward is theirs
    assert "forward of a LlamaRMSNorm was replaced again" in caplog.text
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_decorators_are_kept() -> None:
    """`with_global` under a decorator, as transformers 4 has them; and one that hides it."""
    from functools import wraps

    def twice(function: Callable[..., int]) -> Callable[..., int]:
        @wraps(function)
        def wrapper(*args: Any) -> int:
            return 2 * function(*args)

        return wrapper

    def uses(x: list[int], *, start: int = 3) -> int:
        return len(x) + start + FACTOR

    decorated = twice(uses)
    changed = forwards.with_global(decorated, "FACTOR", 100)
    assert (decorated([1]), changed([1])) == (2 * (1 + 3 + 10), 2 * (1 + 3 + 100))
    assert changed.__wrapped__ is not uses
    assert (changed.__module__, changed.__qualname__) == (__name__, decorated.__qualname__)
    with pytest.raises(LookupError, match="does not call nothing"):
        forwards.with_global(decorated, "nothing", 1)
    decorated.__wrapped__ = lambda: 0
    with pytest.raises(LookupError, match="decorated in an unknown way"):
        forwards.with_global(decorated, "FACTOR", 1)


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR


def test_copied_globals_under_compile() -> None:
    """torch.compile takes the copy's global, and not that of the module which its scope names."""
    changed = forwards.with_global(scaled, "FACTOR", 100)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: changed(x) + 1, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [101, 101]


FACTOR = 10
