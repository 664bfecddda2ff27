"""Every launch goes through `launch.on_grid`, and so has the options that all launches share."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from nanotron_fast.kernels.runtime.launch import on_grid

KERNELS = Path(__file__).parents[2] / "kernels"
# What launches or compiles a kernel, as a method of it with a grid.
METHODS = {"run", "warmup"}


def _names_of_kernels(tree: ast.Module) -> set[str]:
    """Functions under triton.jit, however it is applied, and what is made of them or imported."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(
            "jit" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names if "kernel" in alias.name}
    return names


def bypasses(source: str) -> list[str]:
    """Calls in a file that launch or compile a kernel by themselves.

    `name[grid]` is one where the file defines or imports that name as a kernel, or where it ends
    in "kernel"; whether it is called at once or kept. Other names are tables.
    """
    tree = ast.parse(source)
    kernels = _names_of_kernels(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            root = ast.unparse(node.value).removesuffix(".fn")
            is_kernel = root in kernels or root.rpartition(".")[2].endswith("kernel")
            if is_kernel and isinstance(node.ctx, ast.Load):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            has_grid = any(keyword.arg == "grid" for keyword in node.keywords)
            if has_grid and node.func.attr in METHODS:
                found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    return found


@pytest.mark.parametrize(
    "path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS))
)
def test_no_launch_bypasses_on_grid(path: Path) -> None:
    found = bypasses(path.read_text())
    if path.stem == "launch":
        calls = {line.partition(": ")[2] for line in found}
        assert calls == {"kernel[grid]", "kernel.warmup"}
    else:
        assert found == []


def test_a_launch_asks_for_fused_products() -> None:
    launched = []
    kernel = {(3,): lambda *arguments, **named: launched.append((arguments, named))}
    on_grid(kernel, (3,))(1, 2, N=4)
    assert launched == [((1, 2), {"N": 4, "enable_fp_fusion": True})]


def test_launches_are_found_at_all() -> None:
    launches = sum(
        isinstance(node, ast.Call)
        and re.match(r"on_grid\(|.*\.launch$", ast.unparse(node.func)) is not None
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    )
    assert launches >= 20


JIT = "@triton.jit\ndef _sum(x, N: tl.constexpr):\n    pass\n"


@pytest.mark.parametrize(
    "launch",
    [
        "_sum[(1,)](x, N=2)",
        "_sum[lambda meta: (1,)](x)",
        "launch = _sum[grid]\nlaunch(x)",
        "_sum.run(x, grid=(1,), warmup=False)",
        "_sum.warmup(x, grid=(1,))",
        "module._forward_kernel[(1,)](x)",
        "kernel.fn[grid](x)",
    ],
)
def test_a_bypass_is_seen(launch: str) -> None:
    assert len(bypasses(JIT + launch)) == 1


def test_tables_and_on_grid_are_no_bypass() -> None:
    source = JIT + "on_grid(_sum, (1,))(x)\nTABLE['gelu'](x)\nTABLE['kernel'] = _sum\n"
    assert bypasses(source) == []
