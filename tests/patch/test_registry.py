"""The registry on a small package called nanotron: what it replaces, refuses, reports, restores."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nanotron_fast.errors import ConfigError
from nanotron_fast.patch.nanotron import registry
from nanotron_fast.patch.nanotron.registry import disable, enable, is_enabled, status
from nanotron_fast.patch.nanotron.targets import OPS, RELEASED, TARGETS
from tests.patch.small_nanotron import small_nanotron

FILES = {
    "utils.py": "",
    "models/llama.py": (
        "import torch\n"
        "from nanotron.parallel.tensor_parallel.functional import sharded_cross_entropy as loss\n"
        "class GLUActivation(torch.nn.Module):\n"
        "    def forward(self, merged_states): return 'stock'\n"
    ),
    "parallel/__init__.py": "",
    "parallel/tensor_parallel/__init__.py": "",
    "parallel/tensor_parallel/functional.py": (
        "def sharded_cross_entropy(sharded_logits, target, group): return 'stock'\n"
        "def column_linear(input): return 'stock'\n"
        "def row_linear(input): return 'stock'\n"
    ),
    "optim/__init__.py": "",
    "optim/clip_grads.py": (
        "import torch\n"
        "@torch.profiler.record_function('clip')\n"
        "def clip_grad_norm(mp_pg): return 'stock'\n"
    ),
}


@pytest.fixture
def nanotron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of the small package, by the last part of their names."""
    with small_nanotron(tmp_path, monkeypatch, FILES) as modules:
        last = {name.rpartition(".")[2]: module for name, module in modules.items()}
        yield types.SimpleNamespace(**last)


def states() -> dict[str, str]:
    return {each.target.attribute: each.state for each in status()}


def test_a_function_is_replaced_at_home_and_where_it_was_bound(nanotron: Any) -> None:
    home, importing = nanotron.functional, nanotron.llama
    stock = home.sharded_cross_entropy
    mine = types.ModuleType("a_users_script")
    mine.own_name = stock
    sys.modules["a_users_script"] = mine
    try:
        enable({"cross_entropy"})
        assert home.sharded_cross_entropy is not stock
        assert importing.loss is mine.own_name is home.sharded_cross_entropy
        assert home.sharded_cross_entropy.__name__ == "sharded_cross_entropy"
        disable()
        assert importing.loss is mine.own_name is home.sharded_cross_entropy is stock
    finally:
        del sys.modules["a_users_script"]


def test_a_method_is_replaced_for_instances_that_exist(nanotron: Any) -> None:
    layer = nanotron.llama.GLUActivation()
    stock = vars(nanotron.llama.GLUActivation)["forward"]
    layer.act = type("SiLUActivation", (), {})()
    enable({"glu"})
    assert layer(torch.zeros(2, 4)).shape == (2, 2)
    disable()
    assert vars(nanotron.llama.GLUActivation)["forward"] is stock
    assert layer(None) == "stock"


def test_an_activation_that_is_not_ours_stays_nanotrons(nanotron: Any) -> None:
    layer = nanotron.llama.GLUActivation()
    layer.act = nn.ReLU()
    enable({"glu"})
    assert layer(torch.zeros(2, 4)) == "stock"


def test_a_models_own_functions_are_reached_and_put_back(nanotron: Any) -> None:
    layer = nanotron.llama.GLUActivation()
    layer.act = type("SiLUActivation", (), {})()
    layer.forward = bound = layer.forward  # as wrappers do that keep the method
    layer.loss = loss = nanotron.functional.sharded_cross_entropy
    model = nn.Sequential(layer)
    enable({"glu", "cross_entropy"})
    assert layer.forward(torch.zeros(2, 4)) == "stock"
    enable({"glu", "cross_entropy"}, model)
    assert layer.forward(torch.zeros(2, 4)).shape == (2, 2)
    assert layer.loss is nanotron.functional.sharded_cross_entropy
    disable()
    assert layer.forward is bound
    assert layer.loss is loss


def test_twice_is_harmless(nanotron: Any) -> None:
    first = enable()
    replaced = nanotron.functional.row_linear
    assert enable() is first
    assert nanotron.functional.row_linear is replaced
    disable()
    disable()
    assert nanotron.functional.row_linear(None) == "stock"


def test_other_operations_take_the_place_of_those_that_are_on(nanotron: Any) -> None:
    enable({"linear"})
    enable({"glu"})
    assert nanotron.functional.row_linear(None) == "stock"
    assert {name for name, state in states().items() if state == "on"} == {"GLUActivation.forward"}


def test_what_is_missing_is_reported(nanotron: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nanotron_fast"):
        enable()
    assert states()["TensorParallelEmbedding.forward"] == "missing"
    assert "TensorParallelEmbedding.forward is not in the installed Nanotron" in caplog.text
    # What only main has is no matter of 0.4's.
    assert "Qwen2MLP.forward" not in states()
    assert {each.name for each in TARGETS if RELEASED in each.versions} == {
        each.target.name for each in status()
    }


@pytest.mark.parametrize("how", ["function", "wraps", "class"])
def test_what_somebody_replaced_is_refused(
    nanotron: Any, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    import functools

    stock = nanotron.clip_grads.clip_grad_norm

    def theirs(mp_pg: Any) -> str:
        return "theirs"

    if how == "wraps":
        theirs = functools.wraps(stock)(theirs)
    elif how == "class":
        theirs = functools.partial(theirs)
    nanotron.clip_grads.clip_grad_norm = theirs
    with caplog.at_level(logging.WARNING, "nanotron_fast"):
        enable({"clip"})
    assert nanotron.clip_grads.clip_grad_norm is theirs
    assert states()["clip_grad_norm"] == "refused"
    assert "was replaced by" in caplog.text
    enable({"clip"}, force=True)
    assert states()["clip_grad_norm"] == "on"
    disable()
    assert nanotron.clip_grads.clip_grad_norm is theirs


def test_what_nanotron_decorates_is_its_own(nanotron: Any) -> None:
    enable({"clip"})
    assert states()["clip_grad_norm"] == "on"


def test_what_is_replaced_after_us_stays(nanotron: Any, caplog: pytest.LogCaptureFixture) -> None:
    enable({"linear"})
    nanotron.functional.row_linear = theirs = lambda: None
    with caplog.at_level(logging.WARNING, "nanotron_fast"):
        disable()
    assert nanotron.functional.row_linear is theirs
    assert nanotron.functional.column_linear(None) == "stock"
    assert "row_linear was replaced again" in caplog.text


def test_an_error_half_way_leaves_nothing(nanotron: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry._make

    def fail(target: Any, *rest: Any) -> Any:
        if target.attribute == "row_linear":
            raise OSError("no")
        return real(target, *rest)

    monkeypatch.setattr(registry, "_make", fail)
    with pytest.raises(OSError, match="no"):
        enable()
    assert nanotron.functional.column_linear(None) == "stock"
    assert not is_enabled()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (({"gelu"},), {}, "unknown operations gelu: choose from cross_entropy"),
        (("glu",), {}, "give a set of names"),
        ((), {"z_loss": 1}, "unknown option z_loss"),
        ((), {"z_loss_mode": "right"}, "z_loss_mode is 'right'"),
        ((), {"padding_idx": 3}, "padding_idx is 3"),
        (({"glu"},), {"rope_scaling": True}, 'needs the operation "rope"'),
    ],
)
def test_bad_arguments(nanotron: Any, arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        enable(*arguments, **options)
    assert not is_enabled()


def test_the_environment_chooses(nanotron: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.requested_ops() == frozenset(OPS)
    monkeypatch.setenv("NANOTRON_FAST_OPS", "glu, linear")
    assert registry.requested_ops() == {"glu", "linear"}
    import nanotron_fast.auto  # noqa: F401

    del sys.modules["nanotron_fast.auto"]
    assert {name for name, state in states().items() if state == "on"} == {
        "GLUActivation.forward",
        "column_linear",
        "row_linear",
    }
    monkeypatch.setenv("NANOTRON_FAST_OPS", "glue")
    with pytest.raises(ConfigError, match="NANOTRON_FAST_OPS: unknown operations glue"):
        registry.requested_ops()


def test_every_factory_is_there() -> None:
    for target in TARGETS:
        home, name = target.factory.split(".")
        module = importlib.import_module(f"nanotron_fast.patch.nanotron.replacements.{home}")
        assert callable(getattr(module, name))


def test_threads_take_turns(nanotron: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that enabled at a time took each other's replacements for originals."""
    stock = nanotron.functional.sharded_cross_entropy
    replace_all = registry._replace_all
    start, inside, most = threading.Barrier(2), 0, 0

    def slowly(*asked: Any) -> Iterator[Any]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.2)
        yield from replace_all(*asked)
        inside -= 1

    monkeypatch.setattr(registry, "_replace_all", slowly)

    def turn(ops: set[str]) -> None:
        start.wait()
        enable(ops)

    threads = [
        threading.Thread(target=turn, args=(ops,)) for ops in ({"cross_entropy"}, {"glu", "clip"})
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    disable()
    assert most == 1
    assert nanotron.functional.sharded_cross_entropy is nanotron.llama.loss is stock
    assert nanotron.llama.GLUActivation.forward(None, None) == "stock"
