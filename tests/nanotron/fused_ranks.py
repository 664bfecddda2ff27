"""A rank that trains real Nanotron with whole blocks in one function, and with single operations.

`python -m tests.nanotron.fused_ranks PORT`
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanotron_fast.patch.cpu import cpu_mode
from nanotron_fast.patch.importing import import_nanotron
from nanotron_fast.patch.nanotron.registry import disable, enable, status
from nanotron_fast.patch.nanotron.replacements import fused_blocks, fused_loss, masks
from nanotron_fast.patch.nanotron.targets import FUSED, MAIN, OPS, installed_version
from tests.nanotron.drop_in_ranks import everything
from tests.nanotron.training import Case, batch, build, free_port, start
from tests.parallel.ranks import run_cases

# Of the largest element of a tensor. The loss and what is next to it are the same sums in another
# order. What differs there by rounding has passed the layers where it comes to their weights.
NEAR, FAR = 5e-7, 1e-6
NEXT_TO_THE_LOSS = ("loss", "z_loss", "model.lm_head.pp_block.weight")
KERNELS = {
    "fused_loss": (fused_loss, "linear_cross_entropy"),
    "fused_mlp": (fused_blocks, "tensor_parallel_mlp"),
    "fused_attention": (fused_blocks, "tensor_parallel_attention"),
}
FAMILIES = ("llama", "qwen2")
MODES = ("ALL_REDUCE", "REDUCE_SCATTER")


# What brings a number to the host, and the checks of ids and positions that the CPU alone has.
WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
CHECKS_ON_THE_CPU = {"_check_ids", "check_arguments"}


def families() -> Sequence[str]:
    return FAMILIES if installed_version() == MAIN else FAMILIES[:1]


def step(model: Any, family: str, **changes: Tensor) -> dict[str, Tensor]:
    """Losses and gradients of one batch."""
    model.zero_grad()
    found = model(**{**batch(family, 0), **changes})
    found["loss"].backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
    return {**{name: each.detach() for name, each in found.items()}, **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, whole in expected.items():
        error = (found[name] - whole).abs().max() / whole.abs().max()
        bound = NEAR if name in NEXT_TO_THE_LOSS else FAR
        assert error <= bound, f"{name}: {error:.2g}"


def reasons() -> dict[str, str]:
    """Of the fused operations that are on, each with those of all families' targets."""
    found: dict[str, str] = {}
    for each in status():
        if each.target.op in FUSED and each.state == "on":
            found[each.target.op] = found.get(each.target.op, "") + each.reason
    return found


def assert_nothing_fell_back() -> None:
    assert not any(reasons().values()), reasons()


def each_trains_the_same(family: str, mode: str, context: Any, **overrides: Any) -> None:
    model = build(Case(family=family, mode=mode), context, **overrides)
    enable()
    expected = step(model, family)
    for ops in (*KERNELS, "all"):
        asked = {ops} if ops in KERNELS else set(KERNELS)
        enable({*OPS, *asked})
        spies = {op: mock.patch.object(*KERNELS[op], wraps=getattr(*KERNELS[op])) for op in asked}
        calls = {op: spy.start() for op, spy in spies.items()}
        found = step(model, family)
        if "fused_loss" not in asked:  # the very same sums
            assert all(torch.equal(found[name], each) for name, each in expected.items())
        assert_same(found, expected)
        for op, spy in spies.items():
            spy.stop()
            assert calls[op].called, op
        assert_nothing_fell_back()
    disable()


def with_a_z_loss(context: Any) -> None:
    if installed_version() == MAIN:
        for family in families():
            more = {"z_loss_enabled": True, "z_loss_coefficient": 0.1}
            each_trains_the_same(family, "ALL_REDUCE", context, **more)


def other_masks_and_targets(context: Any) -> None:
    model = build(Case(), context)
    label_ids = batch("llama", 0)["label_ids"].clone()
    label_ids[0, 3:6] = -100
    weights = torch.rand(label_ids.shape)
    for options in ({}, {"ignore_index": -100}):
        for changes in ({"label_ids": label_ids}, {"label_mask": weights}):
            enable(**options)
            expected = step(model, "llama", **changes)
            enable(fused=True, **options)
            assert_same(step(model, "llama", **changes), expected)
    holes = batch("llama", 0)["input_mask"].clone()
    holes[0, 11:] = False
    enable()
    expected = step(model, "llama", input_mask=holes)
    enable(fused=True)
    assert_same(step(model, "llama", input_mask=holes), expected)
    assert reasons()["fused_attention"] == "left to Nanotron: a sequence mask is not full"
    disable()


def what_watches_a_module_is_seen(context: Any) -> None:
    model = build(Case(), context)
    layer = model.model.decoder[0].pp_block
    enable()
    expected = step(model, "llama")
    watched: list[tuple[str, nn.Module]] = [
        ("fused_loss", model.model),
        ("fused_loss", model.model.lm_head),
        ("fused_loss", model.model.lm_head.pp_block),
        ("fused_loss", model.model.cast_to_fp32),
        ("fused_loss", model.loss.pp_block),
        ("fused_mlp", layer.mlp.down_proj),
        ("fused_mlp", layer.mlp.split_silu_mul),
        ("fused_mlp", layer.mlp.split_silu_mul.act),
        ("fused_attention", layer.attn.qkv_proj),
        ("fused_attention", layer.attn.attention),
        ("fused_attention", layer.attn.flash_rotary_embedding),
    ]
    for op, module in watched:
        disable()
        enable(fused=True)
        seen: list[Any] = []
        handle = module.register_forward_hook(lambda _, i, o, seen=seen: seen.append(o))
        assert_same(step(model, "llama"), expected)
        handle.remove()
        assert len(seen) == 1, (op, module)
        assert {name for name, reason in reasons().items() if reason} == {op}, reasons()
        assert step(model, "llama").keys() == expected.keys()
    disable()


def a_linear_of_somebody_else(context: Any) -> None:
    """A subclass, as adapters make them, computes what it likes."""
    model = build(Case(), context)
    linear = model.model.decoder[1].pp_block.mlp.down_proj
    kind = type(linear)

    class Doubled(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 2 * super().forward(x)
            return out

    linear.__class__ = Doubled
    enable()
    expected = step(model, "llama")
    enable(fused=True)
    assert_same(step(model, "llama"), expected)
    assert "down_proj is a Doubled" in reasons()["fused_mlp"]
    disable()


def nothing_waits_for_the_device(context: Any) -> None:
    """What brings a number to the host waits for all that was launched before."""

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.name().removeprefix("aten::") in WAITING:
                callers = {frame.f_code.co_name for frame, _ in traceback.walk_stack(None)}
                assert callers & CHECKS_ON_THE_CPU, (func.name(), traceback.format_stack())
            return func(*args, **(kwargs or {}))

    model = build(Case(), context)
    given = batch("llama", 0)
    for options in ({}, {"fused": True}):
        enable(assume_full_masks=True, **options)
        model(**given)["loss"].backward()  # what is made once, tables say
        given["input_mask"] = given["input_mask"].clone()
        with Watching():
            model(**given)["loss"].backward()
        assert_nothing_fell_back()
    disable()


def a_mask_that_was_not_full_is_reported(context: Any) -> None:
    model = build(Case(), context)
    given = batch("llama", 0)
    given["input_mask"] = given["input_mask"].clone()
    given["input_mask"][0, 11:] = False
    enable(assume_full_masks=True, fused=True)
    with mock.patch.object(masks.logger, "warning") as warning:
        for _ in range(2):
            model(**given)
    assert warning.call_count == 1
    assert warning.call_args.args[1:] == (5, 32)
    disable()


def accumulator_of(model: Any) -> Any:
    from nanotron.optim.gradient_accumulator import FP32GradientAccumulator

    return FP32GradientAccumulator(model.get_named_params_with_correct_tied())


def accumulated(model: Any, accumulator: Any, family: str) -> dict[str, Tensor]:
    """The sums of two micro-batches, after a step that is thrown away."""
    for number in range(3):
        accumulator.backward(model(**batch(family, number))["loss"])
        if number == 0:
            accumulator.zero_grad()
    buffers = accumulator.fp32_grad_buffers
    found = {name: element["fp32_grad"].clone() for name, element in buffers.items()}
    assert all(each["half"].grad is None for each in buffers.values())
    accumulator.zero_grad()
    return found


def error_of(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    pairs = [(found[name], whole) for name, whole in exact.items()]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def gradients_go_straight_into_the_sums(context: Any) -> None:
    for family in families():
        wide = build(Case(family=family), context)
        exact: dict[str, Tensor] = {}
        for number in (1, 2):
            wide(**batch(family, number))["loss"].backward()
        exact = {name: each.grad for name, each in wide.named_parameters()}
        model = build(Case(family=family, dtype="bfloat16"), context)
        accumulator, errors = accumulator_of(model), {}
        for ops in (set(OPS), {*OPS, "main_grad"}, {*OPS, *FUSED}):
            enable(ops)
            errors[len(ops)] = error_of(accumulated(model, accumulator, family), exact)
            assert_nothing_fell_back()
        single, main, fused = errors.values()
        # The fused loss rounds the gradient of the hidden states to bf16 twice, not once.
        assert main <= single * 1.02, errors
        assert fused <= single * 1.2, errors
        linear = model.model.lm_head.pp_block
        assert linear.weight.main_grad is accumulator.get_grad_buffer(
            "model.lm_head.pp_block.weight"
        )
        hidden_gradients_are_not_made(model, accumulator, family)
        disable()
        assert not any(hasattr(each, "main_grad") for each in model.parameters())


def hidden_gradients_are_not_made(model: Any, accumulator: Any, family: str) -> None:
    """No matrix has a gradient of its own after backward, norms have."""
    loss = model(**batch(family, 0))["loss"]
    loss.backward()
    dims = {each.dim() for each in model.parameters() if each.grad is not None}
    assert dims == {1}, [name for name, p in model.named_parameters() if p.grad is not None]
    for each in model.parameters():
        each.grad = None
    accumulator.zero_grad()


def a_model_under_ddp_keeps_its_gradients(context: Any) -> None:
    from nanotron.optim.gradient_accumulator import FP32GradBucketManager

    model = build(Case(dtype="bfloat16"), context)
    accumulator = accumulator_of(model)
    enable(fused=True)
    accumulator.zero_grad()
    assert hasattr(model.model.lm_head.pp_block.weight, "main_grad")
    name = "dp_cp_pg" if installed_version() == MAIN else "dp_pg"
    FP32GradBucketManager(**{name: context.dp_pg}, accumulator=accumulator, param_id_to_name={})
    accumulator.zero_grad()
    assert not any(hasattr(each, "main_grad") for each in model.parameters())
    assert "DistributedDataParallel" in reasons()["main_grad"]
    disable()


def a_watched_parameter_has_its_gradient(context: Any) -> None:
    model = build(Case(dtype="bfloat16"), context)
    accumulator, seen = accumulator_of(model), []
    weight = model.model.decoder[0].pp_block.mlp.down_proj.weight
    weight.register_post_accumulate_grad_hook(lambda each: seen.append(each.grad.shape))
    enable(fused=True)
    accumulated(model, accumulator, "llama")
    assert seen == [weight.shape] * 3
    assert "down_proj.weight: it has hooks" in reasons()["main_grad"]
    disable()


def everything_goes_back(context: Any) -> None:
    enable()
    disable()
    before = everything()
    states = enable(fused=True)
    assert {each.state for each in states} == {"on"}, states
    disable()
    after = everything()
    assert after.keys() == before.keys()
    assert all(after[key] is value for key, value in before.items())


CASES: tuple[Callable[[Any], None], ...] = (
    everything_goes_back,
    with_a_z_loss,
    other_masks_and_targets,
    what_watches_a_module_is_seen,
    a_linear_of_somebody_else,
    nothing_waits_for_the_device,
    a_mask_that_was_not_full_is_reported,
    gradients_go_straight_into_the_sums,
    a_model_under_ddp_keeps_its_gradients,
    a_watched_parameter_has_its_gradient,
)


def cases(port: str) -> Iterator[tuple[str, Any]]:
    import_nanotron()
    context = start(int(port))
    for family in families():
        for mode in MODES if context.tensor_parallel_size > 1 else MODES[:1]:
            yield f"{family} {mode}", partial(each_trains_the_same, family, mode, context)
    for case in CASES:
        yield case.__name__, partial(case, context)


if __name__ == "__main__":
    with cpu_mode():
        run_cases(cases(sys.argv[1] if len(sys.argv) > 1 else str(free_port())))
