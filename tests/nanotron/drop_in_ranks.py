"""A rank that turns the drop-in on and off under real Nanotron: faults, options, identity."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nanotron_fast.patch.cpu import cpu_mode
from nanotron_fast.patch.importing import import_nanotron
from nanotron_fast.patch.nanotron.registry import disable, enable, is_enabled, status
from nanotron_fast.patch.nanotron.targets import FUSED, MAIN, OPS, TARGETS, installed_version
from tests.nanotron.training import SIZES, Case, batch, build, free_port, start
from tests.parallel.ranks import run_cases

VOCABULARY, TOKENS = 12, 7


def everything() -> dict[tuple[str, str], Any]:
    """What every module and class of Nanotron holds."""
    found = {}
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] != "nanotron":
            continue
        for key, value in [*vars(module).items()]:
            found[name, key] = value
            if inspect.isclass(value) and value.__module__.startswith("nanotron"):
                found |= {(f"{name}.{key}", each): it for each, it in [*vars(value).items()]}
    return found


def identity_is_restored(context: Any) -> None:
    enable()  # whatever it imports is there from now on
    disable()
    before = everything()
    states = enable()
    assert is_enabled()
    single = [each for each in states if each.target.op not in FUSED]
    assert {each.state for each in single} == {"on"}, states
    assert {each.state for each in states if each not in single} == {"off"}, states
    assert len(states) == sum(installed_version() in each.versions for each in TARGETS)
    during = everything()
    changed = {key for key in before if during[key] is not before[key]}
    assert len(changed) > len(states)  # functions, in the modules that import them, too
    assert enable() is states  # a second time changes nothing
    again = everything()
    assert all(again[key] is value for key, value in during.items())
    enable({"glu"})  # something else takes the place of what was on
    assert {each.target.op for each in status() if each.state == "on"} == {"glu"}
    disable()
    after = everything()
    assert after.keys() == before.keys()
    assert all(after[key] is value for key, value in before.items())
    assert not is_enabled()
    assert not status()
    disable()  # and a second time


def names_bound_while_it_was_on(context: Any) -> None:
    """As a script's imports after `import nanotron_fast.auto` are."""
    from nanotron.parallel.tensor_parallel import functional

    enable({"cross_entropy"})
    late = types.ModuleType("late")
    late.loss = functional.sharded_cross_entropy
    sys.modules["late"] = late
    try:
        enable({"cross_entropy"}, ignore_index=-100)  # other options reach it too
        assert late.loss is functional.sharded_cross_entropy
        assert pickle.loads(pickle.dumps(late.loss)) is late.loss
        disable()
        assert late.loss is functional.sharded_cross_entropy
        assert "nanotron_fast" not in late.loss.__code__.co_filename
    finally:
        del sys.modules["late"]


def importing_modules_are_patched(context: Any) -> None:
    from nanotron import trainer
    from nanotron.models import llama
    from nanotron.optim import clip_grads
    from nanotron.parallel.tensor_parallel import functional, nn
    from nanotron.serialize import main, weights

    enable()
    assert llama.sharded_cross_entropy is functional.sharded_cross_entropy
    assert nn.column_linear is functional.column_linear
    assert trainer.clip_grad_norm is clip_grads.clip_grad_norm
    assert main.save_weights is weights.save_weights
    assert "nanotron_fast" in llama.sharded_cross_entropy.__code__.co_filename
    disable()


def loss_of(logits: Tensor, target: Tensor, **more: Any) -> Any:
    from nanotron.parallel.tensor_parallel import functional

    rank, size = dist.get_rank(), dist.get_world_size()
    shard = logits.chunk(size, -1)[rank].clone()
    return functional.sharded_cross_entropy(shard, target, dist.group.WORLD, **more)


def a_target_outside_the_vocabulary(context: Any) -> None:
    """Fault 3: Nanotron counts it as a logit of 0 after the maximum is taken away."""
    logits = torch.randn(TOKENS, VOCABULARY) * 3
    target = torch.randint(VOCABULARY, (TOKENS,))
    target[2] = -100
    stock = loss_of(logits, target)
    enable({"cross_entropy"})
    ours = loss_of(logits, target)
    torch.testing.assert_close(ours, stock)
    faulty = logits[2].logsumexp(-1) - logits[2].max()
    torch.testing.assert_close(ours[2], faulty)
    enable({"cross_entropy"}, ignore_index=-100)
    right = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(loss_of(logits, target), right)
    disable()


def z_loss(context: Any) -> None:
    """Fault 1: the largest logit is missing from Nanotron's log-sum-exp. 0.4 has no z-loss."""
    logits = torch.randn(TOKENS, VOCABULARY) * 3
    target = torch.randint(VOCABULARY, (TOKENS,))
    whole = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    faulty = 0.1 * (logits.logsumexp(-1) - logits.amax(-1)).square()
    right = 0.1 * logits.logsumexp(-1).square()
    if installed_version() == MAIN:
        torch.testing.assert_close(loss_of(logits, target, z_loss_coef=0.1)[1], faulty)
    for mode, expected in (("nanotron", faulty), ("correct", right)):
        enable({"cross_entropy"}, z_loss_mode=mode)
        loss, z = loss_of(logits, target, z_loss_coef=0.1)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(loss, whole + expected)
    disable()


def column_linear_in_three_dimensions(context: Any) -> None:
    """Fault 2: main's backward raises at tp=1 without async communication; ours does not."""
    from nanotron.parallel.tensor_parallel import functional
    from nanotron.parallel.tensor_parallel.enum import TensorParallelLinearMode

    def run() -> Tensor:
        x = torch.ones(3, 2, 4, requires_grad=True)
        weight = torch.ones(5, 4, requires_grad=True)
        mode = TensorParallelLinearMode.REDUCE_SCATTER
        out = functional.column_linear(x, weight, None, alone, mode, False)
        out.sum().backward()
        return x.grad

    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    if installed_version() == MAIN:
        with pytest.raises(RuntimeError):
            run()
    enable({"linear"})
    torch.testing.assert_close(run(), torch.full((3, 2, 4), 5.0))
    disable()


def row_linear_refuses_what_nanotron_refuses(context: Any) -> None:
    from nanotron.parallel.tensor_parallel import functional
    from nanotron.parallel.tensor_parallel.enum import TensorParallelLinearMode

    enable({"linear"})
    tensor, mode = torch.ones(2, 2), TensorParallelLinearMode.ALL_REDUCE
    with pytest.raises(ValueError, match="ALL_REDUCE"):
        functional.row_linear(tensor, tensor, None, dist.group.WORLD, mode, True)
    disable()


def padding_token(context: Any) -> None:
    """Nanotron takes the padding token's id for a row of every shard."""
    from nanotron.parallel.tensor_parallel.enum import TensorParallelLinearMode
    from nanotron.parallel.tensor_parallel.nn import TensorParallelEmbedding

    rank, half = dist.get_rank(), VOCABULARY // dist.get_world_size()
    mode = TensorParallelLinearMode.ALL_REDUCE

    def rows_without_gradient() -> list[int]:
        layer = TensorParallelEmbedding(
            VOCABULARY, 4, dist.group.WORLD, mode, padding_idx=1, dtype=torch.float32
        )
        layer(torch.arange(VOCABULARY)).sum().backward()
        return [i for i, row in enumerate(layer.weight.grad) if not row.any()]

    assert half > 1
    assert rows_without_gradient() == [1]
    enable({"embedding"})
    assert rows_without_gradient() == [1]
    enable({"embedding"}, padding_idx="global")
    assert rows_without_gradient() == ([1] if rank == 0 else [])
    disable()


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


def rope_scaling(context: Any) -> None:
    """Fault 4: Nanotron keeps `rope_scaling` and does not look at it."""

    def logits(**enabling: Any) -> Tensor:
        model = build(Case(), context, rope_scaling=SCALING if scaled else None)
        if enabling:
            enable({"rope"}, **enabling, model=model if late else None)
        given = {name: each for name, each in batch("llama", 0).items() if "label" not in name}
        found: Tensor = model.model(**given)
        return found.detach()

    scaled = late = False
    plain = logits()
    scaled = True
    torch.testing.assert_close(logits(), plain)  # stock
    enable({"rope"})
    torch.testing.assert_close(logits(), plain)  # ours, by default
    enable({"rope"}, rope_scaling=True)
    right = logits()
    assert (right - plain).abs().max() > 1e-2
    disable()
    late = True  # a model that was there before
    torch.testing.assert_close(logits(rope_scaling=True), right)
    disable()
    late = False
    with pytest.raises(RuntimeError, match=r"enable\(model=\.\.\.\)"):
        logits(rope_scaling=True)
    disable()
    # The same frequencies as transformers, through our tables.
    scaled_tables(right, plain)


def scaled_tables(right: Tensor, plain: Tensor) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from nanotron_fast.kernels.rope.tables import rope_tables

    head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    config = LlamaConfig(**SIZES, rope_scaling=SCALING, rope_theta=10000.0)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    cos, _ = rope_tables(head_dim, 16, 10000.0, SCALING)
    torch.testing.assert_close(cos, torch.outer(torch.arange(16.0), frequencies).cos())
    assert right.shape == plain.shape


def masks_that_are_not_full(context: Any) -> None:
    """Nanotron counts tokens by the mask's sums: ours reproduces it, padding and all."""
    model = build(Case(), context)
    given = batch("llama", 0)
    given = {"input_ids": given["input_ids"], "input_mask": given["input_mask"].clone()}
    full = model.model(**given).detach()
    given["input_mask"][0, 11:] = False
    stock = model.model(**given).detach()
    enable()
    torch.testing.assert_close(model.model(**given).detach()[:, :1], stock[:, :1])
    given["input_mask"][0, 11:] = True  # the same tensor, changed in place
    torch.testing.assert_close(model.model(**given).detach(), full)
    disable()


def generation_is_nanotrons(context: Any) -> None:
    """Without autograd logits are fp32, also of a bf16 model."""
    model = build(Case(dtype="bfloat16"), context)
    given = {k: v for k, v in batch("llama", 0).items() if "label" not in k}
    enable()
    with torch.no_grad():
        assert model.model(**given).dtype == torch.float32
    assert model.model(**given).dtype == torch.bfloat16
    assert "cast_to_fp32" not in vars(model.model)
    disable()


def masks_made_in_inference_mode(context: Any) -> None:
    """Validation moves its batches to the device there; tensors count no versions then."""
    model = build(Case(), context)
    given = {k: v for k, v in batch("llama", 0).items() if "label" not in k}
    with torch.inference_mode():
        given = {name: each.clone() for name, each in given.items()}
        stock = model.model(**given)
        for options in ({}, {"assume_full_masks": True}):
            enable({"rope", "attention"}, **options)
            torch.testing.assert_close(model.model(**given), stock)
            disable()
        given["input_mask"][0, 9:] = False
        stock = model.model(**given)
        enable({"attention"})
        torch.testing.assert_close(model.model(**given)[:, :1], stock[:, :1])
        disable()


def a_loss_of_somebody_else_gets_fp32(context: Any) -> None:
    from nanotron.models import llama

    model = build(Case(dtype="bfloat16"), context)
    given = {k: v for k, v in batch("llama", 0).items() if "label" not in k}
    stock = llama.sharded_cross_entropy
    llama.sharded_cross_entropy = lambda *args, **kwargs: stock(*args, **kwargs)
    try:
        enable()
        assert model.model(**given).dtype == torch.float32
    finally:
        disable()
        llama.sharded_cross_entropy = stock


def adamw_goes_back_and_forth(context: Any) -> None:
    from nanotron.optim.gradient_accumulator import FP32GradientAccumulator
    from nanotron.optim.named_optimizer import NamedOptimizer
    from nanotron.optim.optimizer_from_gradient_accumulator import OptimizerFromGradientAccumulator

    def make() -> Any:
        model = build(Case(dtype="bfloat16"), context)
        named = list(model.get_named_params_with_correct_tied())
        return model, OptimizerFromGradientAccumulator(
            gradient_accumulator_builder=lambda given: FP32GradientAccumulator(
                named_parameters=given, grad_buckets_named_params=named
            ),
            named_params_or_groups=named,
            optimizer_builder=lambda groups: NamedOptimizer(
                groups, lambda params: torch.optim.AdamW(params, lr=0.1)
            ),
        )

    def step(model: Any, optimizer: Any) -> None:
        optimizer.gradient_accumulator.backward(model(**batch("llama", 0))["loss"])
        optimizer.step()
        optimizer.zero_grad()
        for each in optimizer.gradient_accumulator.parameters.values():
            assert torch.equal(each["half"], each["fp32"].to(torch.bfloat16))

    before = make()
    enable({"adamw"})
    step(*before)  # built before: torch's own, and it says so once
    assert type(before[1].get_base_optimizer()) is torch.optim.AdamW
    model, optimizer = make()
    base = optimizer.get_base_optimizer()
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1.0)
    step(model, optimizer)
    assert type(copy.deepcopy(base)) is torch.optim.AdamW
    assert pickle.loads(pickle.dumps(base.__reduce_ex__(2)[1]))[0] is torch.optim.AdamW
    enable()  # something else: it stays ours
    assert type(base).__name__ == "FusedAdamW"
    step(model, optimizer)
    scheduler.step()
    for ops in (set(), {"accumulation"}, {"adamw"}):
        disable()
        if ops:
            enable(ops)
        step(model, optimizer)
    disable()
    assert type(base) is torch.optim.AdamW


CASES: tuple[Callable[[Any], None], ...] = (
    identity_is_restored,
    names_bound_while_it_was_on,
    importing_modules_are_patched,
    masks_made_in_inference_mode,
    a_loss_of_somebody_else_gets_fp32,
    adamw_goes_back_and_forth,
    a_target_outside_the_vocabulary,
    z_loss,
    column_linear_in_three_dimensions,
    row_linear_refuses_what_nanotron_refuses,
    padding_token,
    rope_scaling,
    masks_that_are_not_full,
    generation_is_nanotrons,
)


def cases(port: str) -> Iterator[tuple[str, Any]]:
    import_nanotron()
    context = start(int(port))
    assert len(OPS) == 13
    for case in CASES:
        yield case.__name__, partial(case, context)


if __name__ == "__main__":
    with cpu_mode():
        run_cases(cases(sys.argv[1] if len(sys.argv) > 1 else str(free_port())))
