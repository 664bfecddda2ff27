"""Compiles every kernel launch of the cases beside it for each GPU architecture, without a GPU.

    python -m tests.kernels.compiling [--arch 80 90 100] [--brief] [--candidates] [module ...]

Each module beside this one lists FILES of kernels/ that it is for, every kernel of which it must
launch, and CASES: functions that call the public operations on CPU tensors.
A launch is not run: it is caught, and compiled with the very arguments it was given, once for every
configuration where the kernel is autotuned. With --brief the launches of an autotuned kernel take
its configurations in turn, and but for sm_90 the first and the last launch of each kernel stand for
all. With --candidates they are compiled by the configurations that a sweep times beside those of
the rules, and by those alone. Prints a line for each binary with registers, spills, shared memory,
and loads, stores and asynchronous copies of 16 bytes. Exits with 1 where one does not compile,
spills without standing in ALLOWED_SPILLS, wants more shared memory than the architecture has, or
asks for stages and has no copies. The lines of a module follow one that begins with `==`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["NANOTRON_FAST_BACKEND"] = "triton"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

from nanotron_fast.kernels.runtime import occupancy, tuning

ARCHITECTURES = (80, 90, 100)
# For which every launch is compiled even with --brief.
_MAIN_ARCHITECTURE = 90
# A pattern of a launch's line -> the most bytes a thread may spill, and why that is borne.
ALLOWED_SPILLS: dict[str, tuple[int, str]] = {
    r"^rms_norm\.kernels\.backward_kernel\b.* COLS=16384,": (
        32,
        "of 64 registers two to four, with Triton 3.9 up to eight, once a row",
    ),
    r"^rms_norm\.kernels\.backward_kernel\b.*HAS_DH_OUT=True.* COLS=16384,.* STAGES=3,": (
        96,
        "two, and 24 with Triton 3.8 and 3.9 for sm_100, while the next row is on its way",
    ),
}
# Of one operation for one shape.
_MOST_CANDIDATES = 6
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")
# A copy of 16 bytes from global to shared memory that nobody waits for.
_LONG_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10\b")
# An access of 16 bytes to global memory.
_LONG_ACCESS = r"\b%s\.global[\w.:]*\.(?:v4\.[bfsu]32|v2\.[bfsu]64|v8\.[bfsu]16)\b"
# Before what is said of each module.
_HEADING = "== "
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """What a binary is made from; equal launches make the same binary."""

    module: str
    kernel: str
    signature: tuple[tuple[str, Any], ...]
    # By name, or by path where they lie in a tuple.
    constants: tuple[tuple[str | tuple[int, ...], Any], ...]
    divisible: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, Any], ...]

    def runs_on(self, architecture: int) -> bool:
        """The bulk copy engine came with sm_90; such configurations are not tried before it."""
        return architecture >= 90 or not dict(self.constants).get("TMA", False)

    def __str__(self) -> str:
        shown = [f"{name}={value}" for name, value in (*self.constants, *self.options)]
        types = ",".join(sorted({kind for _, kind in self.signature if str(kind)[0] == "*"}))
        return f"{self.module}.{self.kernel}[{types}]({', '.join(shown)})"


def _signature_type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel argument of type {type(value)}")


def _launch(function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """The launch as Triton would specialise it: ones and None are constants."""
    options = tuple((name, kwargs[name]) for name in _OPTIONS if name in kwargs)
    values = dict(zip(function.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in function.arg_names}
    constants, divisible = [], []

    def specialised(value: Any, parameter: Any, *path: int) -> Any:
        if type(value) is tuple:
            return tuple(specialised(each, parameter, *path, i) for i, each in enumerate(value))
        is_plain = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_plain and value == 1):
            name = parameter.name if len(path) == 1 else path
            constants.append((name, getattr(value, "value", value)))
            return "constexpr"
        if isinstance(value, torch.Tensor) or (is_plain and value % 16 == 0):
            divisible.append(path)
        return _signature_type(value)

    signature = [
        (each.name, specialised(values.get(each.name, each.default), each, index))
        for index, each in enumerate(function.params)
    ]
    module = function.fn.__module__.removeprefix("nanotron_fast.kernels.")
    return Launch(
        module,
        function.fn.__name__,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        options,
    )


def _catch(launches: dict[Launch, None], *, is_brief: bool) -> None:
    """Replaces every way to launch a kernel by one that notes the launch."""
    turns: Counter[Autotuner] = Counter()

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        if callable(grid):
            named = dict(zip(self.arg_names, args, strict=False)) | kwargs
            grid = grid(named)
        assert all(size > 0 for size in grid), f"{self.fn.__name__}: grid {grid}"
        launches[_launch(self, args, kwargs)] = None

    def autotuned(self: Autotuner, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        self.nargs = named
        configs = self.prune_configs(kwargs) or self.configs
        if is_brief:
            configs = [configs[turns[self] % len(configs)]]
            turns[self] += 1
        for config in configs:
            self.fn.run(*args, **{**kwargs, **config.all_kwargs()})

    JITFunction.run = run
    Autotuner.run = autotuned
    assert Heuristics  # heuristics call the run of what they wrap: nothing to replace


def _pretend(architecture: int) -> None:
    """Operations that ask for a device's shared memory are told this architecture's."""
    limit = occupancy.shared_memory_of(divmod(architecture, 10))
    occupancy.shared_memory_limit = lambda device: limit
    tuning.forget()  # launches that were made for another


def _find(launch: Launch) -> JITFunction:
    function = getattr(
        importlib.import_module(f"nanotron_fast.kernels.{launch.module}"), launch.kernel
    )
    while not isinstance(function, JITFunction):
        function = function.fn
    return function


def _never_launched(files: Iterable[str], launches: Iterable[Launch]) -> list[str]:
    """Kernels of these files in kernels/ that no case launched."""
    found = {f"{launch.module}.{launch.kernel}" for launch in launches}
    missing = []
    for file in files:
        module = importlib.import_module(f"nanotron_fast.kernels.{file}")
        defined = [key for key in vars(module) if key.endswith("_kernel")]
        # One imported from elsewhere belongs to the file that defines it.
        mine = [key for key in defined if _owner(vars(module)[key]) == module.__name__]
        missing += [f"{file}.{key}" for key in mine if f"{file}.{key}" not in found]
    return missing


def _allowed_spills(launch: Launch) -> int:
    patterns = ALLOWED_SPILLS.items()
    return max((most for found, (most, _) in patterns if re.search(found, str(launch))), default=0)


def _owner(function: Any) -> str:
    while not isinstance(function, JITFunction):
        function = function.fn
    return str(function.fn.__module__)


@dataclass(frozen=True)
class Binary:
    """Registers and spilled bytes of a thread, shared memory of a program.

    And the instructions for loads, stores and copies to shared memory of 16 bytes.
    """

    registers: int
    spills: int
    shared_bytes: int
    loads: int
    stores: int
    copies: int

    def faults(self, launch: Launch, architecture: int) -> list[str]:
        """What is wrong with it, in words."""
        limit = occupancy.shared_memory_of(divmod(architecture, 10))
        checks = {
            f"SPILLS {self.spills} bytes": self.spills > _allowed_spills(launch),
            f"WANTS {self.shared_bytes} of {limit} bytes": self.shared_bytes > limit,
            "COPIES nothing ahead": dict(launch.constants).get("STAGES", 1) > 1 and not self.copies,
        }
        return [words for words, is_wrong in checks.items() if is_wrong]

    def __str__(self) -> str:
        spills = f", {self.spills} bytes spilled" if self.spills else ""
        long = {"loads": self.loads, "stores": self.stores, "copies": self.copies}
        counted = "".join(f", {count} {name}" for name, count in long.items() if count)
        return f"{self.registers} registers{spills}, {self.shared_bytes} bytes shared{counted}"


def compile_for(launch: Launch, architecture: int) -> Binary:
    """What the launch becomes on an architecture."""
    source = ASTSource(
        _find(launch),
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={path: [["tt.divisibility", 16]] for path in launch.divisible},
    )
    options = {name: value for name, value in launch.options if value is not None}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Binary(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        # A kernel's stack holds nothing but spills: Triton's code has no arrays of its own there.
        spills=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared_bytes=int(binary.metadata.shared),
        loads=len(re.findall(_LONG_ACCESS % "ld", binary.asm["ptx"])),
        stores=len(re.findall(_LONG_ACCESS % "st", binary.asm["ptx"])),
        copies=len(_LONG_COPY.findall(binary.asm["ptx"])),
    )


def _call(module: ModuleType, launches: Mapping[Launch, None]) -> Iterator[str]:
    """Calls a module's cases, which fills `launches`; gives what is wrong with them."""
    for case in module.CASES:
        try:
            case()
        except Exception:  # the other modules are compiled all the same
            yield f"{getattr(case, '__name__', case)}\n{traceback.format_exc()}"
    for kernel in _never_launched(module.FILES, launches):
        yield f"no case launches {kernel}"


def _call_candidates(module: ModuleType, launches: dict[Launch, None]) -> Iterator[str]:
    """Leaves in `launches` those of candidates alone."""
    yield from _call(module, launches)
    by_rule = set(launches)
    for place in range(_MOST_CANDIDATES):

        def pick(
            kind: type[tuning.Tuned], key: dict[str, int], place: int = place
        ) -> tuning.Tuned | None:
            candidates = kind.candidates_for(key)
            assert len(candidates) <= _MOST_CANDIDATES, kind
            return candidates[place] if place < len(candidates) else None

        with tuning.picking(pick):
            yield from _call(module, launches)
    for launch in by_rule:
        del launches[launch]


def _ends(launches: Iterable[Launch]) -> Iterator[Launch]:
    """The first and the last launch of each kernel."""
    by_kernel: dict[tuple[str, str], list[Launch]] = {}
    for launch in launches:
        by_kernel.setdefault((launch.module, launch.kernel), []).append(launch)
    for first, *others in by_kernel.values():
        yield from (first, *others[-1:])


def _report(problems: Iterable[str], compiled: Mapping[tuple[Launch, int], Future[Binary]]) -> bool:
    """Prints what became of a module's launches, and gives whether all of them are well."""
    failures = 0
    for problem in problems:
        failures += 1
        print(f"FAILED {problem}")
    for (launch, architecture), result in compiled.items():
        try:
            binary = result.result()
        except Exception as error:
            failures += 1
            print(f"FAILED sm_{architecture} {launch}\n  {type(error).__name__}: {error}")
            continue
        faults = binary.faults(launch, architecture)
        failures += bool(faults)
        print(f"{', '.join(faults) or 'ok'} sm_{architecture} {binary} {launch}")
    launched = {launch for launch, _ in compiled}
    print(f"{len(compiled)} binaries of {len(launched)} launches, {failures} failures")
    return not failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--candidates", action="store_true")
    options = parser.parse_args()
    call = _call_candidates if options.candidates else _call
    names = [info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)])]
    names = options.modules or [name for name in names if name != "__main__"]
    modules = {name: importlib.import_module(f"tests.kernels.compiling.{name}") for name in names}
    launches: dict[Launch, None] = {}
    _catch(launches, is_brief=options.brief)
    jobs: dict[str, list[tuple[Launch, int]]] = {name: [] for name in modules}
    problems: dict[str, dict[str, None]] = {name: {} for name in modules}
    for architecture in options.arch:
        _pretend(architecture)
        for name, module in modules.items():
            launches.clear()
            problems[name] |= dict.fromkeys(call(module, launches))
            found = [each for each in launches if each.runs_on(architecture)]
            if options.brief and architecture != _MAIN_ARCHITECTURE:
                found = [*_ends(found)]
            jobs[name] += [(each, architecture) for each in found]
    is_whole = True
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        wanted = dict.fromkeys(job for name in modules for job in jobs[name])
        compiled = {job: pool.submit(compile_for, *job) for job in wanted}
        for name in modules:
            print(f"{_HEADING}{name}")
            is_whole &= _report(problems[name], {job: compiled[job] for job in jobs[name]})
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
