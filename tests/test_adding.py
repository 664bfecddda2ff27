"""An operation and a target of the drop-in that are made up, added by their pages in docs alone.

The blocks of Python in a page are taken as they are: the first line of each names the file that it
is, or the list of a file that it is put into.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nanotron_fast import kernels
from nanotron_fast.kernels.runtime import backend
from nanotron_fast.patch.nanotron import registry, replacements, targets
from tests.kernels import operations

DOCS = Path(__file__).parents[1] / "docs"
NAME = "squared_relu"
REPLACEMENT = f"{replacements.__name__}.{NAME}"


def blocks_of(page: str) -> dict[str, str]:
    """The blocks of a page: what the first line says of the place -> the rest."""
    found = re.findall(r"^```python\n# (.+?)\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    return dict(found)


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
    real = backend.on_grid

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
    ("page", "blocks"), [("adding-an-operation.md", OPERATION), ("adding-a-target.md", TARGET)]
)
def test_a_page_names_files_that_are_there(page: str, blocks: dict[str, str]) -> None:
    text = (DOCS / page).read_text()
    assert text.count("```python") == len(blocks)
    root = DOCS.parent
    for name in set(
        re.findall(r"`((?:kernels|tests|nanotron_fast|benchmarks|docs)/[\w/.]+)`", text)
    ):
        if NAME not in name:
            assert (root / name).exists(), f"{page} names {name}"
