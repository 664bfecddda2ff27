"""What is imported when, and in which direction.

The rooms and their arrows are drawn in docs/architecture.md. The law covers every file of the
package and of kernels/, and what is imported inside functions too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import nanotron_fast
from tests.train.configs import save

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ROOT / "tests" / "golden" / "training" / "llama_tied_tp2_zero0"
HEAVY = ("torch", "transformers", "triton", "safetensors", "numpy", "huggingface_hub")

# A room, and what its files may import beside each other. "_C" and "_cuda" are the native parts.
BASE = ("errors", "extras", "version", "interruption", "units", "words")
CONVERTER = (*BASE, "_C", "moves", "model", "formats", "families")
ALLOWED: Mapping[str, tuple[str, ...]] = {
    "errors": (),
    "version": (),
    "interruption": (),
    "units": ("errors",),
    "words": (),
    "extras": ("errors",),
    "moves": (*BASE, "_C"),
    "model": ("errors",),
    "formats": ("errors", "moves", "model"),
    "families": ("errors", "moves", "model", "formats"),
    "checkpoints": (*CONVERTER, "kernels.pack", "kernels.rope.tables"),
    "kernels": ("errors", "extras", "moves.row", "_C", "_cuda"),
    "parallel": ("errors", "extras", "kernels"),
    "models": (
        "errors",
        "extras",
        "model",
        "formats",
        "families",
        "checkpoints",
        "kernels",
        "parallel",
    ),
    "patch": (*CONVERTER, "checkpoints", "kernels", "parallel"),
    # Never patch: what trains here is not Nanotron.
    "train": (*CONVERTER, "checkpoints", "kernels", "parallel", "models"),
    "cli": (*CONVERTER, "_cuda", "checkpoints", "kernels", "models", "patch", "train"),
    "auto": ("extras", "patch"),
    "__main__": ("interruption", "cli"),
    # The face: what it exports, imported when it is asked for.
    "": ("extras", "version"),
}
# Folders of a room that stand beside each other: none imports another.
APART = (
    ("formats.huggingface", "formats.nanotron"),
    ("patch.nanotron", "patch.transformers"),
)


def modules() -> Iterator[tuple[str, Path]]:
    """Every module's name below nanotron_fast, and its file."""
    package = ROOT / "nanotron_fast"
    for base, prefix in ((package, ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(base.rglob("*.py")):
            parts = (*prefix, *path.relative_to(base).with_suffix("").parts)
            if prefix or parts[0] != "kernels":
                yield ".".join(part for part in parts if part != "__init__"), path


FILES = dict(modules())
NATIVE = {"_C", "_cuda"}
# Before the name of another package.
FOREIGN = "package "
# Beside the standard library, what kernels/ may import.
OF_KERNELS = {"torch", "triton"}


@cache
def imports_of(name: str) -> frozenset[str]:
    """The modules of this package that a module imports, inside functions too."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(FILES[name].read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            # Stand-ins take another package's name, and import within it.
            assert is_within(name, "patch.stand_ins"), f"{name}: a relative import"
            is_package = FILES[name].name == "__init__.py"
            above = name.split(".")[: len(name.split(".")) - node.level + is_package]
            assert above[:3] == name.split(".")[:3], f"{name}: a relative import from outside"
            continue
        if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            # import_module("nanotron_fast...") and the like.
            found |= {each.value for each in node.args if _is_text(each)}
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                below = full.removeprefix("nanotron_fast").lstrip(".")
                is_module = below in FILES or below in NATIVE
                found.add(full if is_module else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        pending.extend(ast.iter_child_nodes(node))
    return frozenset(
        each.removeprefix("nanotron_fast").lstrip(".")
        if each.partition(".")[0] == "nanotron_fast"
        else f"{FOREIGN}{each.partition('.')[0]}"
        for each in found
    ) - {name}


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def is_within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


@pytest.mark.parametrize("name", FILES, ids=lambda name: name or "nanotron_fast")
def test_imports_run_one_way(name: str) -> None:
    room = name.partition(".")[0]
    assert room in ALLOWED, f"{name}: say in ALLOWED what the room {room} may import"
    allowed = ALLOWED[room]
    for imported in imports_of(name):
        if imported.startswith(FOREIGN):
            package = imported.removeprefix(FOREIGN)
            is_free = room != "kernels" or package in OF_KERNELS | sys.stdlib_module_names
            assert is_free or (room, package) == ("kernels", "flash_attn"), (
                f"{name} imports {package}"
            )
            continue
        assert (is_within(imported, room) and room) or any(
            is_within(imported, each) for each in allowed
        ), f"{name or 'nanotron_fast'} imports {imported}; {room} may import {', '.join(allowed)}"


@pytest.mark.parametrize("apart", APART, ids=" and ".join)
def test_wings_do_not_lean_on_each_other(apart: tuple[str, ...]) -> None:
    for wing in apart:
        others = [each for each in apart if each != wing]
        for name in FILES:
            if is_within(name, wing):
                leaning = [m for m in imports_of(name) if any(is_within(m, o) for o in others)]
                assert not leaning, f"{name} imports {', '.join(leaning)}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name in done:
            return
        for imported in sorted(imports_of(name)):
            if imported in FILES and imported:
                walk(imported, (*path, name))
        done.add(name)

    for name in FILES:
        walk(name, ())


def run(code: str, *blocked: str) -> None:
    """Runs code in a new process in which some packages cannot be imported."""
    block = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-c", block + code], check=True, cwd="/")


def test_importing_the_package_imports_nothing_heavy() -> None:
    run(
        "import nanotron_fast\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)"
    )


def test_a_start_imports_what_the_flags_are_made_of_and_nothing_else() -> None:
    wanted = {
        "nanotron_fast",
        "nanotron_fast.version",
        "nanotron_fast.errors",
        "nanotron_fast.interruption",
        "nanotron_fast.model",
        "nanotron_fast.model.ranks",
        "nanotron_fast.model.topology",
        "nanotron_fast.checkpoints",
        "nanotron_fast.checkpoints.option_values",
        "nanotron_fast.checkpoints.options",
        "nanotron_fast.cli",
        "nanotron_fast.cli.app",
        "nanotron_fast.cli.commands",
        "nanotron_fast.cli.entry",
        "nanotron_fast.cli.examples",
        "nanotron_fast.cli.flags",
        "nanotron_fast.cli.generate",
        "nanotron_fast.cli.help",
        "nanotron_fast.cli.reshard",
        "nanotron_fast.cli.run",
        "nanotron_fast.cli.streams",
        "nanotron_fast.cli.tokenize",
        "nanotron_fast.cli.train",
        "nanotron_fast.cli.writing",
    }
    run(
        "import contextlib\n"
        "from nanotron_fast.cli.commands import main\n"
        "sys.argv = ['nanotron-fast', 'convert', '--help']\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "found = {name for name in sys.modules if name.partition('.')[0] == 'nanotron_fast'}\n"
        f"assert found == {wanted!r}, found ^ {wanted!r}\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)"
    )


def test_a_conversion_there_and_back_imports_nothing_heavy(tmp_path: Path, golden_hf: Path) -> None:
    run(
        "import nanotron_fast as nf\n"
        f"nf.convert({str(golden_hf)!r}, {str(tmp_path / 'there')!r},"
        " topology=nf.Topology(tp=2, pp=2))\n"
        f"nf.convert({str(tmp_path / 'there')!r}, {str(tmp_path / 'back')!r})\n"
        f"assert nf.verify({str(golden_hf)!r}, {str(tmp_path / 'back')!r}).equal\n"
        f"nf.reshard({str(TRAINING)!r}, {str(tmp_path / 'states')!r}, tp=1, zero_stage=1)\n"
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
        "from nanotron_fast.cli.commands import main\n"
        "main()",
        "torch",
        "transformers",
        "triton",
        "safetensors",
    )
    assert command != "convert" or (tmp_path / "there" / "model_config.json").is_file()


def test_what_a_run_will_take_is_said_without_torch(tmp_path: Path, golden_hf: Path) -> None:
    changes = {"model": {"init_method": {"path": str(golden_hf)}}, "tokens__sequence_length": 8}
    path = save(tmp_path / "c.yaml", **changes)
    run(
        "from nanotron_fast.cli.dry_run import dry_run\n"
        f"assert dry_run({str(path)!r}, memory='80GB').estimate.parameters\n"
        "import nanotron_fast.models as models\n"
        "assert set(models.__all__) == set(dir(models))\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)"
    )


def test_kernels_run_from_the_tree_with_torch_triton_and_numpy_alone() -> None:
    """What a machine with a GPU has before anything is installed on it."""
    link = ROOT / "nanotron_fast" / "kernels"
    code = (
        "import importlib, pkgutil\n"
        "prefix = 'nanotron_fast.kernels.'\n"
        "names = {finder: getattr(finder, '__name__', '') for finder in sys.meta_path}\n"
        "sys.meta_path = [finder for finder in names if 'Editable' not in names[finder]]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import nanotron_fast.kernels, nanotron_fast.parallel\n"
        f"assert nanotron_fast.kernels.__file__ == {str(link / '__init__.py')!r}\n"
        "for module in pkgutil.walk_packages(nanotron_fast.kernels.__path__, prefix):\n"
        "    importlib.import_module(module.name)\n"
        # As long again as all the rest, which only those who compile need to wait for.
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    assert link.readlink() == Path("../kernels")
    others = ("typer", "rich", "yaml", "safetensors", "transformers", "huggingface_hub", "pybind11")
    run(code, "nanotron_fast._C", "hypothesis", *others)


def test_every_public_name_is_there() -> None:
    for name in nanotron_fast.__all__:
        assert getattr(nanotron_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = nanotron_fast.nonsense
