"""What a captured CUDA graph is given, and what it is refused, with the capture pretended."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nanotron_fast.kernels.attention import configs
from nanotron_fast.kernels.matmul import kernels as matmul_kernels
from nanotron_fast.kernels.optimizer import (
    accumulate_,
    adamw,
    adamw_step_,
    clip_grad_norm_,
    multi_tensor,
    plan,
)
from nanotron_fast.kernels.pack import choice as pack_choice
from nanotron_fast.kernels.runtime import capture, launch

GPU = torch.device("cuda", 7)


def _scaled(x_ptr, factor, N):
    pass


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """From where this is undone on, nothing is captured any more."""
    monkeypatch.setattr(plan, "_looks", {})
    monkeypatch.setattr(capture, "_kept", {})
    for tables in (multi_tensor._bundles, multi_tensor._layout, multi_tensor.addresses_at):
        tables.cache_clear()
    patch = pytest.MonkeyPatch()
    patch.setattr(capture, "is_capturing", lambda device: True)
    yield patch
    patch.undo()


def lists(count: int, *values: float) -> list[list[Tensor]]:
    return [[torch.full((5,), float(value)) for _ in range(count)] for value in values]


def step(params, grads, averages, squares, steps) -> None:
    accumulate_(averages, grads, 0.0)
    clip_grad_norm_(grads, 1.0)
    adamw_step_(params, grads, averages, squares, steps, lr=0.5, weight_decay=0.0)


def test_a_capture_is_that_of_the_current_stream(monkeypatch) -> None:
    assert torch.cuda.is_available() or not capture.is_capturing(GPU)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for answer in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda it=answer: it)
        assert capture.is_capturing(GPU) is answer
        assert not capture.is_capturing(torch.device("cpu"))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not capture.is_capturing(GPU)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)


def test_lists_that_are_new_are_refused(triton_path, capturing) -> None:
    mains, grads = lists(2, 0, 1)
    with pytest.raises(RuntimeError, match="captures an operation on lists of tensors"):
        accumulate_(mains, grads)
    capturing.undo()
    assert plan._looks == {}
    assert all(not main.any() for main in mains)
    accumulate_(mains, grads)
    assert all(main.eq(1).all() for main in mains)


def test_what_was_run_before_is_captured_and_kept(triton_path, capturing, monkeypatch) -> None:
    """A replay reads the tables: they stay, however many other lists come after."""
    tensors = [*lists(3, 1, 1, 0, 0), torch.zeros(())]
    with monkeypatch.context() as before:
        before.setattr(capture, "is_capturing", lambda device: False)
        step(*tensors)
    step(*tensors)
    read = [bundle.addresses for each in capture._kept.values() for bundle in each.bundles]
    assert len(capture._kept) == len(read) == 4
    capturing.undo()
    monkeypatch.setattr(plan, "_NUM_REMEMBERED", 1)
    monkeypatch.setattr(plan, "NUM_PLANS", 1)
    step(*lists(3, 1, 1, 0, 0), torch.zeros(()))
    assert [bundle.addresses for each in capture._kept.values() for bundle in each.bundles] == read
    assert len(capture._kept) == 4


def test_what_a_watched_run_captures_is_kept(triton_path, capturing, monkeypatch) -> None:
    """Under a profiler and in a compiled graph operators make no plans, and read tables as well."""
    tensors = [*lists(3, 1, 1, 0, 0), torch.zeros(())]
    monkeypatch.setattr(plan, "is_watched", lambda: True)
    with monkeypatch.context() as before:
        before.setattr(capture, "is_capturing", lambda device: False)
        step(*tensors)
        assert not capture._kept
    step(*tensors)
    step(*tensors)
    kept = capture._kept.values()
    assert len(kept) == 4  # the norm and the clipping read the same; the counts of steps are one
    read = [each if isinstance(each, Tensor) else each[0].addresses for each in kept]
    watchers = [*map(weakref.ref, read)]
    del read
    for cache in (multi_tensor._bundles, multi_tensor._layout, multi_tensor.addresses_at):
        cache.cache_clear()
    assert all(watcher() is not None for watcher in watchers)


def test_a_plan_is_kept_once(triton_path, capturing) -> None:
    mains, grads = lists(1, 0, 1)
    with pytest.MonkeyPatch.context() as before:
        before.setattr(capture, "is_capturing", lambda device: False)
        accumulate_(mains, grads)
    for _ in range(3):
        accumulate_(mains, grads)
    assert len(capture._kept) == 1


def test_the_tables_of_the_stream_that_warmed_up(monkeypatch) -> None:
    """A capture is on another stream than the warm-up was."""

    class Stream:
        cuda_stream = 5

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(capture, "is_capturing", lambda device: False)
    assert multi_tensor.stream_of_tables(GPU) == 5
    monkeypatch.setattr(Stream, "cuda_stream", 6)
    monkeypatch.setattr(capture, "is_capturing", lambda device: True)
    assert multi_tensor.stream_of_tables(GPU) == 5
    with pytest.raises(RuntimeError, match="run it once before, then capture it"):
        multi_tensor._to_device(torch.zeros(1), GPU)
    del multi_tensor._last_streams[GPU]


def test_a_number_of_a_step_is_on_the_device(capturing) -> None:
    """It would be copied from where the host had it, in every replay."""
    elsewhere = torch.device("meta")
    lr = torch.tensor(0.5)
    with pytest.raises(RuntimeError, match="captures a step of AdamW whose lr is on cpu"):
        adamw._scalar("lr", lr, elsewhere)
    assert adamw._scalar("lr", lr, lr.device) is lr
    capturing.undo()
    assert adamw._scalar("lr", lr, elsewhere).is_meta


def test_nothing_is_timed(capturing) -> None:
    """Triton asks for the configurations to time where a kind of call is new."""
    prune = configs.tuned(configs.DQ, configs.DQ_DOCUMENTS, configs.DQ_OPTIONS)
    prune = prune["prune_configs_by"]["early_config_prune"]
    half = torch.zeros(1, dtype=torch.float16)
    attention = {"HAS_WINDOW": False, "HAS_SOFTCAP": False, "VARLEN": False, "CAN_TMA": False}
    attention |= {"BLOCK_D": 64}
    product = SimpleNamespace(args={"x_ptr": half, "tokens_bucket": 16}, rest={"EVEN_K": True})
    with pytest.raises(RuntimeError, match="captures attention of a kind whose blocks are not"):
        prune([], {"q_ptr": half}, **attention)
    with pytest.raises(RuntimeError, match="captures a fused product of a shape whose blocks"):
        matmul_kernels._prune([], product.args, **product.rest)
    capturing.undo()
    assert prune([], {"q_ptr": half}, **attention)
    assert matmul_kernels._prune([], product.args, **product.rest)


def test_the_packer_refuses_a_table_that_it_would_copy(capturing) -> None:
    with pytest.raises(RuntimeError, match="pack: 1 moves are too many for a launch that a graph"):
        pack_choice._items_on(torch.device("cpu"), bytes(8 * pack_choice.NUM_COLUMNS))


@pytest.fixture
def loading(monkeypatch) -> list[int]:
    """A GPU whose binaries do nothing but add the first number of each launch to a list."""
    launched: list[int] = []

    class Binary(SimpleNamespace):
        """As Triton's: it is loaded when it is asked how to run."""

        @property
        def run(self) -> Any:
            self.module = "loaded"
            return lambda *given: launched.append(given[-2])

        def _init_handles(self) -> None:
            self.module = "loaded"

    def do_compile(self: Any, key: Any, signature: Any, device: int, *rest: Any) -> Any:
        binary = Binary(module=None, function=0, packed_metadata=(), launch_metadata=lambda *_: 0)
        return self.device_caches[device][0].setdefault(key, binary)

    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    monkeypatch.setattr(launch, "_binaries", {})
    return launched


def test_a_binary_is_loaded_before(loading, capturing) -> None:
    """CUDA loads none while a graph is captured, and Triton would not try again after that."""
    kernel = JITFunction(_scaled)
    start = launch.on_grid(kernel, (1,))
    first = launch.Prepared((1,), (16,), N=2)
    x = torch.zeros(1)
    for attempt in (lambda: start(x, 16, N=2), lambda: first.launch(kernel, x)):
        with pytest.raises(RuntimeError, match="captures _scaled, of a kind that is not loaded"):
            attempt()
    capturing.undo()
    start(x, 16, N=2)
    capturing.setattr(capture, "is_capturing", lambda device: True)
    # The same binary, whatever we remember of it.
    start(x, 32, N=2)
    first.launch(kernel, x)
    assert loading == [16, 32, 16]
    with pytest.raises(RuntimeError, match="captures _scaled, of a kind that is not loaded"):
        start(x, 17, N=2)


def test_a_binary_of_a_tuned_kernel_is_loaded_before(loading, capturing) -> None:
    """One kind that was timed has several: of numbers that 16 divides, and of others."""
    kernel = triton.autotune([triton.Config({"N": 2})], [])(JITFunction(_scaled))
    start = launch.on_grid(kernel, lambda blocks: (blocks["N"],))
    x = torch.zeros(1)
    with pytest.raises(RuntimeError, match="captures _scaled, of a kind that is not loaded"):
        start(x, 16)
    capturing.undo()
    start(x, 16)
    capturing.setattr(capture, "is_capturing", lambda device: True)
    start(x, 32)
    assert loading == [16, 32]
    with pytest.raises(RuntimeError, match="captures _scaled, of a kind that is not loaded"):
        start(x, 17)


def test_what_the_tuner_has_launched_is_loaded_for_launches_with_its_blocks(
    loading, capturing
) -> None:
    """Triton finds a binary by its options, in their order."""
    config = triton.Config({"N": 2})
    kernel = triton.autotune([config], [])(JITFunction(_scaled))
    x = torch.zeros(1)
    with pytest.MonkeyPatch.context() as before:
        before.setattr(capture, "is_capturing", lambda device: False)
        launch.on_grid(kernel, lambda blocks: (blocks["N"],))(x, 16)
    launch.Prepared((2,), (16,), **config.all_kwargs()).launch(kernel.fn, x)
    launch.on_grid(kernel.fn, (2,))(x, 32, **config.all_kwargs())
    launch.compiled(kernel.fn, x, 48, **config.all_kwargs())
    assert loading == [16, 16, 32]
