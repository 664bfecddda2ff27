"""A family, an operation and a target of the drop-in, all made up, added by docs' pages alone.

The blocks of Python in a page are taken as they are: the first line of each names the file that it
is, or the list of a file that it is put into.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import nanotron_fast as nf
from nanotron_fast import families, kernels
from nanotron_fast.errors import UnsupportedModelError
from nanotron_fast.formats.huggingface.checkpoint import layout_shards
from nanotron_fast.formats.nanotron import classes
from nanotron_fast.formats.nanotron.classes import LLAMA_CONFIG, base
from nanotron_fast.kernels.runtime import launch
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.patch.nanotron import registry, replacements, targets
from tests.kernels import operations

DOCS = Path(__file__).parents[1] / "docs"
NAME = "squared_relu"
REPLACEMENT = f"{replacements.__name__}.{NAME}"


def blocks_of(page: str) -> dict[str, str]:
    """The blocks of a page: what the first line says of the place -> the rest."""
    found = re.findall(r"^```python\n# (.+?)\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    return dict(found)


FAMILY = blocks_of("adding-a-family.md")
OPERATION = blocks_of("adding-an-operation.md")
TARGET = blocks_of("adding-a-target.md")


def write(folder: Path, blocks: dict[str, str], place: str) -> Path:
    """A block as a file: Triton reads the source of a kernel from one."""
    path = folder / Path(place).name
    path.write_text(blocks[place])
    return path


def load(path: Path, name: str) -> ModuleType:
    """A file as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def operation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The module of the page, found beside those of kernels/."""
    folder = tmp_path_factory.mktemp("kernels")
    write(folder, OPERATION, f"kernels/{NAME}.py")
    kernels.__path__.append(str(folder))
    importlib.invalidate_caches()
    name = f"{kernels.__name__}.{NAME}"
    yield importlib.import_module(name)
    kernels.__path__.remove(str(folder))
    delattr(kernels, NAME)
    del sys.modules[name]


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_tests(module: ModuleType, fixtures: dict[str, Callable[[], Any]]) -> int:
    """Calls the tests of a module with all their parameters, and says how many calls that were."""
    calls = 0
    for name, test in vars(module).items():
        if not name.startswith("test_"):
            continue
        marks = [mark.args for mark in getattr(test, "pytestmark", ()) if mark.args]
        for values in itertools.product(*(values for _, values in marks)):
            given = dict(zip((name for name, _ in marks), values, strict=True))
            wanted = set(inspect.signature(test).parameters) - set(given)
            test(**given, **{name: fixtures[name]() for name in wanted})
            calls += 1
    return calls


@pytest.mark.parametrize("path", ["triton", "torch"])
def test_the_operation_passes_its_own_tests(
    path: str, operation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tests = load(write(tmp_path, OPERATION, f"tests/kernels/test_{NAME}.py"), "added_tests")
    fixtures = {"path": lambda: path, "device": lambda: device, "triton_path": lambda: device}
    assert run_tests(tests, fixtures) == 11


def test_the_environment_chooses_the_path(
    operation: ModuleType, triton_path: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    real = launch.on_grid

    def on_grid(kernel: Any, grid: Any) -> Any:
        launched.append(kernel)
        return real(kernel, grid)

    monkeypatch.setattr(operation, "on_grid", on_grid)
    x = torch.randn(7, device=triton_path, requires_grad=True)
    operation.squared_relu(x).sum().backward()
    assert launched == [operation._forward_kernel, operation._backward_kernel]
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "torch")
    operation.squared_relu(x).sum().backward()
    assert len(launched) == 2


def test_the_operation_is_asked_what_all_are_asked(
    operation: ModuleType, triton_path: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = OPERATION["tests/kernels/operations.py, in OPERATIONS"]
    names = {**vars(operations), NAME: operation.squared_relu}
    (case,) = eval(f"({line})", names)
    found = operations.run(case.call, case.make(triton_path))
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    in_a_graph = operations.run(compiled, case.make(triton_path))
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "torch")
    expected = operations.run(case.call, case.make(triton_path))
    assert len(found) == 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(in_a_graph, expected)


def test_its_launches_can_be_compiled(
    operation: ModuleType, triton_path: torch.device, tmp_path: Path
) -> None:
    """The cases run as they are; compiling them would take a process of its own."""
    place = f"tests/kernels/compiling/{NAME}.py"
    cases = load(write(tmp_path, OPERATION, place), "added_cases")
    assert cases.FILES == (NAME,)
    if not torch.cuda.is_available():
        for case in cases.CASES:
            case()


@pytest.fixture
def target(operation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacement beside the others, and its line among the targets."""
    folder = tmp_path / "replacements"
    folder.mkdir()
    write(folder, TARGET, f"nanotron_fast/patch/nanotron/replacements/{NAME}.py")
    monkeypatch.setattr(replacements, "__path__", [*replacements.__path__, str(folder)])
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, REPLACEMENT, raising=False)
    line = TARGET["nanotron_fast/patch/nanotron/targets.py, in TARGETS"]
    added = eval(f"({line})", vars(targets).copy())
    monkeypatch.setattr(registry, "TARGETS", (*targets.TARGETS, *added))
    monkeypatch.setattr(registry, "OPS", (*targets.OPS, *(each.op for each in added)))


def test_the_target_passes_its_own_test(
    target: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = load(write(tmp_path, TARGET, f"tests/patch/test_{NAME}.py"), "added_patch_tests")
    fixtures = {"tmp_path": lambda: tmp_path, "monkeypatch": lambda: monkeypatch}
    assert run_tests(tests, fixtures) == 1
    assert not registry.is_enabled()


def test_an_unknown_operation_names_the_new_one_too(target: None) -> None:
    with pytest.raises(Exception, match=f"unknown operations gelu: choose .*, {NAME}"):
        registry.enable({"gelu"})


@pytest.mark.parametrize(
    ("page", "blocks"),
    [
        ("adding-a-family.md", FAMILY),
        ("adding-an-operation.md", OPERATION),
        ("adding-a-target.md", TARGET),
    ],
)
def test_a_page_names_files_that_are_there(page: str, blocks: dict[str, str]) -> None:
    text = (DOCS / page).read_text()
    assert text.count("```python") == len(blocks)
    root = DOCS.parent
    for name in set(
        re.findall(r"`((?:kernels|tests|nanotron_fast|benchmarks|docs)/[\w/.]+)`", text)
    ):
        if NAME not in name and not name.endswith("madeup.py"):
            assert (root / name).exists(), f"{page} names {name}"


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> families.Family:
    """The page's class and table, each beside the others of its kind, and registered."""
    monkeypatch.setattr(base, "_CLASSES", dict(base._CLASSES))
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    for package, folder in ((classes, "classes"), (families, "families")):
        (place,) = (place for place in FAMILY if place.endswith(f"{folder}/madeup.py"))
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, FAMILY, place)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / folder)])
        monkeypatch.delitem(sys.modules, f"{package.__name__}.madeup", raising=False)
    importlib.invalidate_caches()
    table: families.Family = importlib.import_module(f"{families.__name__}.madeup").FAMILY
    families.register(table)
    return table


def made_up(root: Path) -> Path:
    """A tiny model of the family, as its config.json and its tensors say."""
    config = {"model_type": "madeup", "width": 32, "depth": 3, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 40}
    shapes: dict[str, tuple[int, ...]] = {"embed": (40, 32), "norm": (32,)}
    for layer in range(3):
        own = {"n1": (32,), "n2": (32,), "qn": (8,), "kn": (8,), "q": (32, 32), "k": (16, 32)}
        own |= {"v": (16, 32), "out": (32, 32), "gate": (48, 32), "up": (48, 32), "down": (32, 48)}
        shapes |= {f"b.{layer}.{name}": shape for name, shape in own.items()}
    (file,), _ = layout_shards([(name, Dtype.BF16, each) for name, each in shapes.items()], 10**9)
    data = np.random.default_rng(0).bytes(file.size_bytes - len(file.header))
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    (root / file.name).write_bytes(file.header + data)
    return root


def test_the_family_converts_there_and_back(family: families.Family, tmp_path: Path) -> None:
    hf, there, back = made_up(tmp_path / "hf"), tmp_path / "there", tmp_path / "back"
    nf.convert(hf, there, topology=nf.Topology(tp=2, pp=2))
    config = json.loads((there / "model_config.json").read_text())
    assert config["is_madeup_config"]
    assert config["layers"][0]["attention"]["qk_norm"]
    assert len(list(there.rglob("attn/q_norm/*.safetensors"))) == 3
    nf.convert(there, back)
    assert nf.verify(hf, there).equal
    assert nf.verify(hf, back).equal
    config = json.loads((back / "config.json").read_text())
    assert (config["model_type"], config["depth"], config["width"]) == ("madeup", 3, 32)


def test_a_class_that_normalises_nothing_does_not_take_it(
    family: families.Family, tmp_path: Path
) -> None:
    """With Llama's class the table would lose the norms: it is refused for what that lacks."""
    hf = made_up(tmp_path / "hf")
    stock = dataclasses.replace(family, name="stock", model_class=LLAMA_CONFIG)
    families.register(stock)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "model_type": "stock"}))
    with pytest.raises(UnsupportedModelError, match=r"qk-norm.*LlamaConfig does not"):
        nf.plan(hf, tmp_path / "there")
