"""Our operations under transformers' models: the same results."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nanotron_fast.kernels.runtime.backend import is_interpreting
from nanotron_fast.patch.transformers import forwards as forwards
from nanotron_fast.patch.transformers.models import (
    TRANSFORMERS_OPS,
    disable_transformers,
    enable_transformers,
)

transformers = pytest.importorskip("transformers")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, VOCABULARY = 2, 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # so that all parts of the model matter for the result
    "pad_token_id": 0,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"mlp_bias": True, "attention_bias": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5, "hidden_act": "gelu", "head_dim": 8}),
}
ALL_TAKEN = {"rms_norm": 2 * LAYERS + 1, "rope": LAYERS, "glu": LAYERS, "cross_entropy": 1}


def make(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    prefix, own = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **own, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # transformers starts norms with 1 and biases with 0
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(DEVICE, dtype)


def tokens(batch: int = 2, seq: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (batch, seq), generator=generator).to(DEVICE)


def step(model: Any, **inputs: Any) -> dict[str, Tensor]:
    """Logits, the loss, and the gradient of every parameter that has one."""
    ids = tokens()
    labels = ids.clone()
    labels[0, 3:6], labels[1, -1] = -100, -100
    model.zero_grad()
    out = model(**{"input_ids": ids, "labels": labels, **inputs})
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """In fp32 the two differ by the order of sums: by a few roundings, 2^-24, one after another.

    Measured against the largest value of each tensor; ten operations deep they are below 2e-6.
    """
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max()
        assert error <= 5e-6 * expected.abs().max(), (name, error, expected.abs().max())


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor from the exact one, as a share of that one's length."""
    return {
        name: float((found[name].float() - each).norm() / each.norm())
        for name, each in exact.items()
    }


def assert_as_close(ours: dict[str, float], theirs: dict[str, float], path: str) -> None:
    """Ours is no further from the fp32 model than transformers' own bf16 is.

    It rounds less often, so over all tensors the ratio of the two is below 1, as a median; 1.1
    leaves room for chance. One tensor, of 16 numbers at least, may have bad luck: 2. Triton's
    interpreter truncates where a GPU rounds to nearest, which doubles each error: 1.5 as a median,
    with what is not ours, and 4. The loss is one number, whose errors may cancel in theirs: 2^-8,
    one rounding of the logits.
    """
    is_interpreted = path == "triton" and is_interpreting()
    assert ours["loss"] <= 2**-8
    ratios = {name: ours[name] / theirs[name] for name in ours if name != "loss"}
    assert statistics.median(ratios.values()) <= (1.5 if is_interpreted else 1.1), ratios
    for name, ratio in ratios.items():
        assert ratio <= (4 if is_interpreted else 2), (name, ours[name], theirs[name])


@pytest.fixture(params=["triton", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels, interpreted where there is no GPU, and the references."""
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", request.param)
    return str(request.param)


# --- Results


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32(family: str, path: str) -> None:
    model = make(family)
    theirs = step(model)
    report = enable_transformers(model)
    assert (report.replaced, report.left) == (ALL_TAKEN, [])
    assert_same(step(model), theirs)
    disable_transformers(model)
    after = step(model)
    assert all(torch.equal(after[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(family: str, path: str) -> None:
    """Against the same weights in fp32."""
    model = make(family, torch.bfloat16)
    exact = step(copy.deepcopy(model).float())
    theirs = distance(step(model), exact)
    enable_transformers(model)
    found = step(model)
    assert {found[name].dtype for name in found if name != "loss"} == {torch.bfloat16}
    assert found["loss"].dtype == torch.float32
    assert_as_close(distance(found, exact), theirs, path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of our operations was called."""
    names = {
        "rms_norm": "rms_norm",
        "rope": "rope_apart",
        "glu": "glu_forward",
        "cross_entropy": "vocab_parallel_cross_entropy",
    }
    counts = dict.fromkeys(TRANSFORMERS_OPS, 0)

    def counted(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    for name, attribute in names.items():
        found = getattr(forwards, attribute)
        monkeypatch.setattr(forwards, attribute, partial(counted, name, found))
    return counts


@pytest.mark.parametrize("op", TRANSFORMERS_OPS)
def test_one_operation_alone(op: str, calls: dict[str, int]) -> None:
    """Each is called as often as there are modules for it, and no other is."""
    model = make()
    theirs = step(model)
    assert not any(calls.values())
    report = enable_transformers(model, {op})
    assert report.replaced == {op: ALL_TAKEN[op]}
    assert_same(step(model), theirs)
    assert calls == {**dict.fromkeys(TRANSFORMERS_OPS, 0), op: ALL_TAKEN[op]}


def test_positions_of_each_sequence_and_padding(path: str) -> None:
    model = make()
    mask = torch.ones_like(tokens())
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": positions}
    theirs = step(model, **inputs)
    enable_transformers(model)
    assert_same(step(model, **inputs), theirs)


def test_some_weights_frozen() -> None:
    model = make()
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.requires_grad_(False)
        layer.mlp.up_proj.bias.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(False)
    theirs = step(model)
    enable_transformers(model)
    assert_same(step(model), theirs)


@pytest.mark.parametrize("act", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_activations(act: str) -> None:
    model = make("qwen2", hidden_act=act)
    theirs = step(model)
    assert enable_transformers(model, ["glu"]).replaced == {"glu": LAYERS}
    assert_same(step(model), theirs)


def test_autocast(path: str, calls: dict[str, int]) -> None:
    """Its products are in bf16, the rotary tables are not."""
    model = make()
    exact = step(model)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        theirs = distance(step(model), exact)
        assert enable_transformers(model).left == []
        seen: list[torch.dtype] = []
        down = model.model.layers[0].mlp.down_proj
        down.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        ours = step(model)
    assert seen == [torch.bfloat16]
    assert calls == ALL_TAKEN
    assert {each.dtype for name, each in ours.items() if "weight" in name} == {torch.float32}
    assert_as_close(distance(ours, exact), theirs, path)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, path: str) -> None:
    model = make().train()
    theirs = step(model)
    enable_transformers(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[str] = []
    mlp = model.model.layers[0].mlp
    mlp.down_proj.register_forward_pre_hook(lambda *_: calls.append("down"))
    if reentrant:
        model.enable_input_require_grads()
    assert_same(step(model), theirs)
    assert len(calls) == 2, "the layer was not computed again in backward"


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces the replaced forwards too: our operators are in its graphs."""
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
    found: set[str] = set()

    def backend(graph: Any, inputs: Any) -> Any:
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = make()
    theirs = step(model)
    enable_transformers(model)
    torch._dynamo.reset()
    # A compiled model's names begin with _orig_mod.
    ours = step(torch.compile(model, backend="aot_eager"))
    assert_same({name.removeprefix("_orig_mod."): each for name, each in ours.items()}, theirs)
    with torch.no_grad():
        torch._dynamo.reset()
        logits = torch.compile(model, backend=backend)(tokens()).logits
    assert (logits - theirs["logits"]).abs().max() <= 5e-6 * theirs["logits"].abs().max()
    for operator in ("rope_apart", "rms_norm_forward"):
        assert any(operator in name for name in found), (operator, found)


def test_generates(path: str) -> None:
    model = make().eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(tokens(seq=5), **options)
    enable_transformers(model)
    assert torch.equal(model.generate(tokens(seq=5), **options), expected)


# --- Loss


def their_loss(*args: Any, **kwargs: Any) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(*args, **kwargs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 3},
        {"shift_labels": tokens(seq=6).cpu().roll(2), "labels": None},
        {"something_else": 1},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss(options: dict[str, Any], dtype: torch.dtype, path: str) -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(2, 6, VOCABULARY, device=DEVICE)).to(dtype).requires_grad_()
    before = logits.detach().clone()
    labels = tokens(seq=6)
    labels[0, 2:4], labels[1, 5] = options.get("ignore_index", -100), 3
    options = {"labels": labels, "vocab_size": VOCABULARY, **options}
    ours, theirs = (f(logits, **options) for f in (forwards.causal_lm_loss, their_loss))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)  # sums in another order
    found, expected = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    # One rounding to the logits' dtype in both; the interpreter truncates it.
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 1e-2)
    assert torch.equal(logits, before)


def test_loss_without_labels_that_count() -> None:
    labels = torch.full((1, 4), -100)
    options = {"labels": labels, "vocab_size": 5}
    assert forwards.causal_lm_loss(torch.randn(1, 4, 5), **options).isnan()
    assert their_loss(torch.randn(1, 4, 5), **options).isnan()
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss = forwards.causal_lm_loss(logits, **options, num_items_in_batch=3)
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="an assertion on the GPU ends the process's use")
@pytest.mark.parametrize("label", [-1, 5])
def test_label_outside_the_vocabulary(label: int) -> None:
    labels = torch.tensor([[1, 2, label]])
    with pytest.raises(RuntimeError, match="a label is outside the vocabulary"):
        forwards.causal_lm_loss(torch.randn(1, 3, 5), labels, 5)


def test_num_items_in_batch_reaches_the_loss() -> None:
    model = make()
    theirs = step(model, num_items_in_batch=torch.tensor(5))
    enable_transformers(model)
    assert_same(step(model, num_items_in_batch=torch.tensor(5)), theirs)
