"""What a launch is tuned by: rules, measured entries, and what is wrong with a file of them."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import nanotron_fast.kernels
from nanotron_fast.kernels.attention import configs
from nanotron_fast.kernels.attention.choice import Order, Request, choose_backend
from nanotron_fast.kernels.attention.configs import _BLOCKS
from nanotron_fast.kernels.cross_entropy.operators import _GradientBlocks
from nanotron_fast.kernels.embedding import operators as embedding
from nanotron_fast.kernels.matmul import kernels as matmul
from nanotron_fast.kernels.matmul.kernels import GluBlocks, RopeBlocks
from nanotron_fast.kernels.runtime import launch, tuning
from nanotron_fast.kernels.runtime.tuning import Tuned
from tests.kernels.checks import assert_close
from tests.kernels.operations import OPERATIONS, run

BY_NAME = {operation.name: operation for operation in OPERATIONS}


def _subclasses(kind: type) -> list[type[Tuned]]:
    return [each for sub in kind.__subclasses__() for each in (sub, *_subclasses(sub))]


def every_class() -> dict[str, type[Tuned]]:
    package = nanotron_fast.kernels
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    return {each.operation: each for each in _subclasses(Tuned)}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a file of measured entries, and has it count."""

    def write(entries: Any, **others: Any) -> Path:
        path = tmp_path / "measured.json"
        document = {"architecture": tuning.architecture(), "entries": entries, **others}
        path.write_text(json.dumps(document))
        monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(path))
        tuning.forget()
        return path

    yield write
    monkeypatch.undo()
    tuning.forget()


def entry(key: dict[str, int], **config: int) -> dict[str, Any]:
    return {"key": key, "config": config}


def test_every_operation_has_one_class() -> None:
    assert every_class().keys() == set(tuning.OPERATIONS)
    assert len(_subclasses(Tuned)) == len(tuning.OPERATIONS)


KEY = {"cols": 1024, "itemsize": 2}


def test_an_entry_counts_for_its_key_and_the_rule_for_others(measured) -> None:
    rule = _GradientBlocks.chosen(**KEY)
    assert rule == _GradientBlocks.rule(**KEY)
    measured({"cross_entropy_gradient": [entry(KEY, block=512, num_warps=2)]})
    assert _GradientBlocks.chosen(**KEY) == _GradientBlocks(512, 2)
    assert _GradientBlocks.chosen(itemsize=2, cols=1024) == _GradientBlocks(512, 2)
    assert _GradientBlocks.chosen(**KEY | {"itemsize": 4}) == rule
    assert embedding._GatherBlocks.chosen(**KEY) == embedding._GatherBlocks.rule(**KEY)


def test_measured_entries_are_turned_off(measured, monkeypatch) -> None:
    measured({"cross_entropy_gradient": [entry(KEY, block=512, num_warps=2)]})
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "off")
    tuning.forget()
    assert _GradientBlocks.chosen(**KEY) == _GradientBlocks.rule(**KEY)


def test_the_package_has_a_file_for_an_architecture(measured, monkeypatch) -> None:
    path = measured({"cross_entropy_gradient": [entry(KEY, block=512, num_warps=2)]})
    monkeypatch.delenv(tuning.ENVIRONMENT_VARIABLE)
    monkeypatch.setattr(tuning, "FOLDER", path.parent)
    tuning.forget()
    assert _GradientBlocks.chosen(**KEY) == _GradientBlocks.rule(**KEY)
    path.rename(path.parent / f"{tuning.architecture()}.json")
    tuning.forget()
    assert _GradientBlocks.chosen(**KEY) == _GradientBlocks(512, 2)


def test_what_was_chosen_is_looked_up_once(measured, monkeypatch) -> None:
    monkeypatch.setattr(_GradientBlocks, "rule", classmethod(lambda cls, **key: asked.append(key)))
    asked: list[Any] = []
    tuning.forget()
    for _ in range(3):
        _GradientBlocks.chosen(**KEY)
    assert asked == [KEY]


MALFORMED: list[tuple[Any, str]] = [
    ([], "measured entries are an object with `entries`, by operation"),
    ({"rms_norms": []}, "rms_norms: choose "),
    ({"cross_entropy_gradient": {}}, "cross_entropy_gradient is no list of entries"),
    ({"cross_entropy_gradient": [{}]}, r"gradient\[0\]: has no `key` of cols, itemsize"),
    ({"cross_entropy_gradient": [{"key": KEY}]}, r"\[0\]: has no `config` of block, num_warps"),
    (
        {"cross_entropy_gradient": [entry(KEY, block=512, num_warps=2, stages=3)]},
        r"cross_entropy_gradient\[0\]: unknown field 'stages' of `config`: block, num_warps",
    ),
    (
        {"cross_entropy_gradient": [entry({"cols": 1024}, block=512, num_warps=2)]},
        r"cross_entropy_gradient\[0\]: field 'itemsize' of `key` is None, no whole number",
    ),
    (
        {"cross_entropy_gradient": [entry(KEY, block=512.0, num_warps=2)]},
        r"cross_entropy_gradient\[0\]: field 'block' of `config` is 512.0, no whole number",
    ),
    (
        {"cross_entropy_gradient": [entry(KEY, block=1000, num_warps=2)]},
        r"\[0\]: field 'block' of `config` is 1000, not a power of 2 from 16 to 16384",
    ),
    (
        {"cross_entropy_gradient": [entry(KEY, block=512, num_warps=3)]},
        r"\[0\]: field 'num_warps' of `config` is 3, not a power of 2 from 1 to 32",
    ),
]


@pytest.mark.parametrize(("entries", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_file_is_refused(measured, entries, message) -> None:
    measured(entries)
    with pytest.raises(ValueError, match=rf"measured\.json: .*{message}"):
        _GradientBlocks.chosen(**KEY)


# Of an operation, with a key: what would make no kernel, or one whose results are wrong.
OUT_OF_BOUNDS: list[tuple[str, dict[str, int], dict[str, int], str]] = [
    (
        "rms_norm_backward",
        {"cols": 128, "itemsize": 2},
        {"rows": 0, "num_warps": 4, "stages": 3},
        "'rows' of `config` is 0, not a power of 2 from 1 to 16",
    ),
    (
        "rms_norm_backward",
        {"cols": 128, "itemsize": 2},
        {"rows": 1, "num_warps": 4, "stages": 0},
        "'stages' of `config` is 0, not a whole number from 1 to 8",
    ),
    (  # a segment is walked over in whole blocks: elements would be counted twice
        "grad_norm",
        {"itemsize": 4},
        {"segment": 2048, "block": 4096, "num_warps": 4},
        "'segment' of `config` is 2048, not a power of 2 from 4096 to 1048576",
    ),
    (  # no mask where 64 divides the depth: what lies behind the row would be read
        "matmul_glu",
        {"tokens_bucket": 32, "num_cols": 32, "num_k": 64, "itemsize": 2},
        {"block_m": 16, "block_n": 32, "block_k": 128, "num_stages": 2, "num_warps": 2},
        "'block_k' of `config` is 128, not a power of 2 from 16 to 64",
    ),
    (
        "attention_dq",
        {"block_d": 16, "causal": 1, "options": 1, "documents": 0, "can_tma": 0}
        | {"size_class": 0, "itemsize": 2},
        {"block_m": 16, "block_n": 32, "tma": 1, "num_warps": 2, "num_stages": 2},
        "'tma' of `config` is 1, and `can_tma` of `key` is 0",
    ),
]


@pytest.mark.parametrize(("operation", "key", "config", "message"), OUT_OF_BOUNDS)
def test_what_no_launch_can_have_is_refused(measured, operation, key, config, message) -> None:
    measured({operation: [entry(key, **config)]})
    with pytest.raises(ValueError, match=rf"measured\.json: {operation}\[0\]: field {message}"):
        every_class()[operation].chosen(**key)


# What a key's facts may be, by name: all that a launch could ask for.
FACTS: dict[str, Sequence[int]] = {
    "cols": [1 << i for i in range(18)],
    "head_cols": [1 << i for i in range(9)],
    **dict.fromkeys(("itemsize", "param_itemsize", "grad_itemsize"), (2, 4)),
}


@pytest.mark.parametrize("operation", tuning.OPERATIONS)
def test_rules_and_candidates_are_what_a_file_may_say(operation: str) -> None:
    kind = every_class()[operation]
    assert kind.allowed.keys() - Tuned.allowed.keys() <= {field.name for field in fields(kind)}
    names = inspect.signature(kind.rule).parameters
    facts = [FACTS.get(name, (0, 1)) for name in names]
    for values in itertools.product(*facts):
        key = dict(zip(names, values, strict=True))
        rule = kind.rule(**key)
        for config in (rule, *kind.candidates_for(key)) if rule else ():
            kind.check("here", asdict(config), key)


def test_what_triton_s_tuner_finds_is_what_a_file_may_say() -> None:
    for config in (*matmul._HALF_CONFIGS, *matmul._SLOW_CONFIGS, *matmul._INTERPRETED_CONFIGS):
        for kind in (GluBlocks, RopeBlocks):
            kind.check("here", asdict(kind.of(config)), {})
    names = ("FORWARD", "DQ", "DKV")
    tables = [getattr(configs, f"{n}{of}") for n in names for of in ("", "_DOCUMENTS", "_OPTIONS")]
    found = [config for table in tables for of_dim in table.values() for config in of_dim]
    for config in (*found, configs._FP32, configs.INTERPRETED):
        for kind in _BLOCKS.values():
            kind.check("here", asdict(kind.of(config)), {"can_tma": int(config.kwargs["TMA"])})


@pytest.mark.parametrize("name", ["rms_norm", "glu", "adamw", "accumulate", "clip", "pack"])
@pytest.mark.parametrize("ends", [(0, 0), (-1, -1), (0, -1)], ids=["least", "most", "mixed"])
def test_what_a_file_may_say_changes_no_result(name: str, ends, triton_path) -> None:
    """The least of each field, the most, and the least of the first beside the most of others."""

    def pick(kind: type[Tuned], key: dict[str, int]) -> Tuned:
        first, *rest = (kind.allowed.get(field.name, tuning._USUAL) for field in fields(kind))
        picked.append(kind(first[ends[0]], *(each[ends[1]] for each in rest)))
        return picked[-1]

    picked: list[Tuned] = []
    case = BY_NAME[name]
    expected = run(case.call, case.make(triton_path))
    with tuning.picking(pick):
        results = run(case.call, case.make(triton_path))
    assert picked
    for mine, other in zip(results, expected, strict=True):
        assert_close(mine, other, factor=2)  # each rounds once


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"dry": True}, "is of a dry run"),
        ({"architecture": "sm_37"}, "was measured on sm_37, and this is"),
    ],
)
def test_another_machine_s_file_is_refused(measured, others, message) -> None:
    measured({}, **others)
    with pytest.raises(ValueError, match=message):
        _GradientBlocks.chosen(**KEY)


def test_a_file_serves_the_gpus_of_its_architecture_beside_others(measured, monkeypatch) -> None:
    gpus, current = [(8, 0), (9, 0)], 1
    monkeypatch.setattr(tuning, "is_interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: gpus[gpu])
    narrow, wide = KEY, KEY | {"cols": 2048}
    entries = [entry(key, block=512, num_warps=2) for key in (narrow, wide)]
    measured({"cross_entropy_gradient": entries}, architecture="sm_90")
    assert _GradientBlocks.chosen(**narrow) == _GradientBlocks(512, 2)
    current = 0
    assert _GradientBlocks.chosen(**wide) == _GradientBlocks.rule(**wide)
    assert _GradientBlocks.chosen(**narrow) == _GradientBlocks(512, 2)  # met on the other first
    gpus = [(8, 0), (8, 9)]
    tuning.forget()
    with pytest.raises(ValueError, match="was measured on sm_90, and this is sm_80"):
        _GradientBlocks.chosen(**narrow)


def test_a_file_that_is_none_is_refused(measured, monkeypatch) -> None:
    path = measured({})
    path.write_text("{")
    with pytest.raises(ValueError, match="measured entries cannot be read: Expecting"):
        _GradientBlocks.chosen(**KEY)
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "/nowhere.json")
    with pytest.raises(ValueError, match=r"/nowhere\.json: measured entries cannot be read"):
        _GradientBlocks.chosen(**KEY)


# Operation -> a key that its small case asks for, a configuration that its candidates do not have,
# and what its launches are given then.
CHANGED: dict[str, tuple[str, dict[str, int], dict[str, int], dict[str, int]]] = {
    "cross_entropy": (
        "cross_entropy_statistics",
        {"cols": 128, "itemsize": 4},
        {"per_thread": 8, "num_warps": 1},
        {"LANES": 64, "num_warps": 1},
    ),
    "embedding": (
        "embedding_sum",
        {"cols": 32, "itemsize": 4},
        {"cols": 16, "piece": 8, "tokens": 2, "num_warps": 2},
        {"COLS": 16, "PIECE": 8, "num_warps": 2},
    ),
    "rope_qkv": (
        "rope",
        {"head_cols": 16, "itemsize": 4},
        {"elements": 64, "heads": 2, "num_warps": 2},
        {"Q_HEADS": 2, "TOKENS": 2, "num_warps": 2},
    ),
    "rope_normed": (
        "rope_normed_backward",
        {"head_cols": 16, "has_rest": 0, "itemsize": 4},
        {"elements": 64, "heads": 2, "num_warps": 2},
        {"Q_HEADS": 2, "TOKENS": 2, "num_warps": 2},
    ),
    "rms_norm": (
        "rms_norm_backward",
        {"cols": 128, "itemsize": 4},
        {"rows": 2, "num_warps": 2, "stages": 1},
        {"ROWS": 2, "STAGES": 1, "num_warps": 2},
    ),
    "glu": (
        "glu_forward",
        {"cols": 64, "itemsize": 4},
        {"elements": 32, "num_warps": 1},
        {"ROWS": 1, "COLS": 32, "num_warps": 1},
    ),
    "attention": (
        "attention_dq",
        {"block_d": 16, "causal": 1, "options": 1, "documents": 0, "can_tma": 1}
        | {"size_class": 0, "itemsize": 4},
        {"block_m": 16, "block_n": 32, "tma": 0, "num_warps": 2, "num_stages": 2},
        {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 2, "num_stages": 2},
    ),
    "adamw": (
        "adamw",
        {"param_itemsize": 4, "grad_itemsize": 4},
        {"block": 256, "num_warps": 2},
        {"BLOCK": 256, "num_warps": 2},
    ),
    "clip": (
        "clip_grads",
        {"itemsize": 4},
        {"segment": 4096, "block": 128, "num_warps": 2},
        {"SEGMENT": 4096, "BLOCK": 128, "num_warps": 2},
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_an_entry_changes_launches_and_no_result(
    name: str, triton_path, measured, monkeypatch
) -> None:
    operation, key, config, constants = CHANGED[name]
    case = BY_NAME[name]
    expected = run(case.call, case.make(triton_path))
    launched = launches_of(monkeypatch)
    measured({operation: [entry(key, **config)]})
    results = run(case.call, case.make(triton_path))
    assert any(constants.items() <= each.items() for each in launched)
    for mine, other in zip(results, expected, strict=True):
        assert_close(mine, other, factor=2)  # each rounds once


def test_an_entry_spares_a_product_the_tuner(triton_path, measured, monkeypatch) -> None:
    from nanotron_fast.kernels.matmul import matmul_glu

    x, weight = torch.randn(20, 48, device=triton_path), torch.randn(64, 48, device=triton_path)
    expected, launched = matmul_glu(x, weight), launches_of(monkeypatch)
    key = {"tokens_bucket": 32, "num_cols": 32, "num_k": 48, "itemsize": 4}
    blocks = {"block_m": 16, "block_n": 32, "block_k": 16, "num_stages": 2, "num_warps": 2}
    measured({"matmul_glu": [entry(key, **blocks)]})
    assert_close(matmul_glu(x, weight), expected, factor=2)  # each rounds once
    assert [(each["BLOCK_M"], each["num_stages"]) for each in launched] == [(16, 2)]


def launches_of(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The constants of launches, as they come."""
    launched: list[dict[str, Any]] = []
    on_grid: Callable[..., Any] = launch._launch

    def noted(kernel: Any, grid: Any, /, *arguments: Any, **constants: Any) -> None:
        launched.append(constants)
        on_grid(kernel, grid, *arguments, **constants)

    of_prepared = launch.Prepared.launch

    def prepared(self: launch.Prepared, kernel: Any, *tensors: Any) -> None:
        if not launch._asks_triton(kernel):  # as on a GPU; otherwise it comes by the way above
            launched.append(self.constants)
        of_prepared(self, kernel, *tensors)

    monkeypatch.setattr(launch, "_launch", noted)
    monkeypatch.setattr(launch.Prepared, "launch", prepared)
    return launched


def test_chunks_may_be_smaller_and_never_larger(triton_path, measured) -> None:
    from nanotron_fast.kernels.linear_cross_entropy import operators

    hidden, weight = (torch.empty(rows, 8, device=triton_path) for rows in (4096, 1024))
    key = {"cols": 1024, "itemsize": 4}
    for logits, expected in ((2**20, 1024), (2**40, 4096)):
        measured({"linear_cross_entropy": [entry(key, logits=logits)]})
        parts, buffer = operators._chunks(hidden, weight, 0)
        assert parts[0] == slice(0, expected)
        assert buffer.shape == (expected, 1024)
        assert operators.is_one_chunk(4096, 1024, 0)


def test_what_a_gpu_measured_is_nothing_to_tensors_elsewhere(measured, monkeypatch) -> None:
    """A file of a GPU, named for all processes, and one that has no GPU or does without."""
    from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy

    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "auto")
    measured({}, architecture="sm_37")
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    target = torch.randint(6, (8,))
    loss = linear_cross_entropy(hidden, weight, target, chunk_tokens=3)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.t(), target))
    name, reason = choose_backend(Request(architecture=0), lambda name: "")
    assert name == "torch"
    assert reason.startswith("first of the published order (flash_attn_3 needs a GPU, and there is")


def test_the_measured_order_of_attention_goes_first(measured, monkeypatch) -> None:
    monkeypatch.setattr(tuning, "_is_here", lambda name: False)  # where this runs on an sm_90 too
    names = [field.name for field in fields(Order)]
    ranks = {name: place for place, name in enumerate(reversed(names))}
    key = {"head_cols": 128, "documents": 0, "options": 0, "training": 1}
    measured({"attention_order": [entry(key, **ranks | {"triton": 0})]}, architecture="sm_90")

    def chosen(**request: Any) -> tuple[str, str]:
        return choose_backend(Request(**request), lambda name: "")

    assert chosen() == ("triton", "first of the measured order")
    assert chosen(head_dim=96)[0] == "triton"
    assert chosen(head_dim=64) == ("flash_attn_3", "first of the published order")
    assert chosen(is_training=False) == ("flash_attn_3", "first of the published order")
    with pytest.raises(ValueError, match="was measured on sm_90, and this is sm_80"):
        chosen(architecture=80)


def test_candidates_are_others_than_the_rule() -> None:
    for operation, kind in every_class().items():
        names = kind.rule.__code__.co_varnames[1 : kind.rule.__code__.co_argcount]
        key = dict.fromkeys(names, 64)
        candidates = kind.candidates_for(key)
        # Where there is no rule, Triton's own tuner times what stands in a table.
        assert bool(candidates) == (kind.rule(**key) is not None), operation
        assert all(type(each) is kind for each in candidates), operation
