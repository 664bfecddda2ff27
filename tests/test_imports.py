"""What is imported when, and in which direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nanotron_fast

PACKAGE = Path(nanotron_fast.__file__).parent
HEAVY = ("torch", "transformers", "triton", "safetensors", "numpy", "huggingface_hub")

# Modules from the bottom up; each may import from its own line and from those above it.
LAYERS = (
    {"version", "errors", "kernels", "interruption", "streams"},
    {"dtypes", "topology", "entry", "plain_file", "lfs"},
    {"header", "spec"},
    {"layouts", "families"},
    {"planning", "source"},
    {"engine", "reference", "destination", "processes", "small_files", "_C"},
    {"conversion", "verification", "inspection", "logits", "nanotron_forward", "loading"},
    {"reporting", "scripts", "parallel", "patch"},
    {"environment"},
    {"cli", "auto", ""},
    {"__main__"},
)


def layer_of(module: str) -> int:
    name = module.removeprefix("nanotron_fast").lstrip(".").partition(".")[0]
    return next(index for index, names in enumerate(LAYERS) if name in names)


def imports_of(path: Path) -> set[str]:
    """What a module imports when it is imported: not inside functions or TYPE_CHECKING."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "nanotron_fast":
                found |= {f"nanotron_fast.{alias.name}" for alias in node.names}
                found.discard("nanotron_fast")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_run_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    mine = layer_of(module.removesuffix(".__init__"))
    for name in imports_of(path):
        if name.startswith("nanotron_fast"):
            assert layer_of(name) <= mine, f"{module} imports {name}"


def run(code: str, *blocked: str) -> None:
    """Runs code in a new process in which some packages cannot be imported."""
    block = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-c", block + code], check=True, cwd="/")


def test_importing_the_package_imports_nothing_heavy() -> None:
    run(
        "import nanotron_fast\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)"
    )


def test_a_conversion_there_and_back_imports_nothing_heavy(tmp_path: Path, golden_hf: Path) -> None:
    run(
        "import nanotron_fast as nf\n"
        f"nf.convert({str(golden_hf)!r}, {str(tmp_path / 'there')!r},"
        " topology=nf.Topology(tp=2, pp=2))\n"
        f"nf.convert({str(tmp_path / 'there')!r}, {str(tmp_path / 'back')!r})\n"
        f"assert nf.verify({str(golden_hf)!r}, {str(tmp_path / 'back')!r}).equal\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)"
    )


@pytest.mark.parametrize("command", ["convert", "verify", "inspect"])
def test_commands_run_where_the_training_packages_are_not_installed(
    command: str, tmp_path: Path, golden_hf: Path
) -> None:
    words = {
        "convert": [str(golden_hf), str(tmp_path / "there"), "--tp", "2"],
        "verify": [str(golden_hf), str(golden_hf)],
        "inspect": [str(golden_hf)],
    }[command]
    run(
        f"sys.argv = ['nanotron-fast', {command!r}, *{words!r}]\n"
        "from nanotron_fast.cli import main\n"
        "main()",
        "torch",
        "transformers",
        "triton",
        "safetensors",
    )
    assert command != "convert" or (tmp_path / "there" / "model_config.json").is_file()


def test_kernels_run_from_the_tree_with_torch_triton_and_numpy_alone() -> None:
    """What a machine with a GPU has before anything is installed on it."""
    root = PACKAGE.parent
    code = (
        "import importlib, pkgutil\n"
        "names = {finder: getattr(finder, '__name__', '') for finder in sys.meta_path}\n"
        "sys.meta_path = [finder for finder in names if 'Editable' not in names[finder]]\n"
        f"sys.path.insert(0, {str(root)!r})\n"
        "import nanotron_fast.kernels, nanotron_fast.parallel\n"
        f"assert nanotron_fast.kernels.__file__ == {str(PACKAGE / 'kernels/__init__.py')!r}\n"
        "for module in pkgutil.iter_modules(nanotron_fast.kernels.__path__):\n"
        "    importlib.import_module(f'nanotron_fast.kernels.{module.name}')\n"
    )
    assert (PACKAGE / "kernels").readlink() == Path("../kernels")
    others = ("typer", "rich", "yaml", "safetensors", "transformers", "huggingface_hub", "pybind11")
    run(code, "nanotron_fast._C", "hypothesis", *others)


def test_every_public_name_is_there() -> None:
    for name in nanotron_fast.__all__:
        assert getattr(nanotron_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = nanotron_fast.nonsense
