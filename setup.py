"""Builds `nanotron_fast._C`, and `nanotron_fast._cuda` where there is a CUDA compiler.

Everything else about the package is in pyproject.toml. Environment variables:

- CXX, CXXFLAGS, LDFLAGS: the C++ compiler and what it is told besides;
- NANOTRON_FAST_CUDA: 0 leaves the packer for GPUs out, 1 makes a missing nvcc an error;
- NANOTRON_FAST_CUDA_ARCHS: what it is compiled for, "80;90;100" or "80,90", instead of the GPUs
  that are here; with neither a list nor a GPU it is left out, unless NANOTRON_FAST_CUDA=1, which
  then builds it for sm_80, sm_90 and sm_100;
- CUDA_HOME: where CUDA is, if neither on PATH, in /usr/local/cuda nor among Python's packages;
- NVCC_CCBIN: the C++ compiler that nvcc uses, if not CXX.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# A build backend runs this file without its folder among those that modules are looked for in.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import setup_cuda

COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    # The same roundings on every machine.
    "-ffp-contract=off",
]
# Half the time of a build at -O3, and they only call what is compiled so.
BINDINGS_FLAGS = ["-O1"]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow"]
# The files that know Python, and are compiled for each version of it; all else is compiled once.
BINDINGS = "bindings.cpp"
SOURCES = sorted(
    path for room in ("", "core/", "cast/", "hash/") for path in glob(f"csrc/{room}*.cpp")
)
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))

RULES = """\
ninja_required_version = 1.5
rule compile
  command = {compile} {extra} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule compile_bindings
  command = {compile} {bindings} {extra} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = {link} $in $libraries -o $out
  description = link $out
"""
CUDA_RULE = """\
rule compile_cuda
  command = {compile} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
"""


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", ""))
    candidates = [command] if command else [["c++"], ["g++"], ["clang++"]]
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate
    tried = ", ".join(candidate[0] for candidate in candidates)
    raise CompileError(
        f"nanotron_fast._C needs a C++20 compiler and none was found (tried {tried}). "
        "Install g++ 11 or clang 14 or later, or name one in the environment variable CXX."
    )


def ninja_path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_command(*words: str) -> str:
    return shlex.join(words).replace("$", "$$")


class NinjaBuildExt(build_ext):
    """Compiles in parallel, and only what changed: ninja knows the headers from depfiles."""

    def finalize_options(self) -> None:
        # Here, not in setup(): only a build asks for compilers.
        self.cuda, self.cuda_line = setup_cuda.find_cuda()
        modules = self.distribution.ext_modules
        if self.cuda is not None and all(module.name != setup_cuda.MODULE for module in modules):
            modules.append(Extension(setup_cuda.MODULE, CUDA_SOURCES, language="c++"))
        super().finalize_options()

    def build_extensions(self) -> None:
        import ninja
        import pybind11

        print(self.cuda_line, file=sys.stderr)
        cxx = compiler()
        bindings = [*BINDINGS_FLAGS]
        # System headers, so that their warnings are not ours.
        for path in (pybind11.get_include(), sysconfig.get_path("include")):
            bindings += ["-isystem", path]
        extra_compile = shlex.split(os.environ.get("CXXFLAGS", ""))
        extra_link = shlex.split(os.environ.get("LDFLAGS", ""))

        # Not build_temp: editable installs make that a temporary folder, and nothing is reused.
        self.objects = Path("build", f"native-{sysconfig.get_platform()}")
        self.own_objects = self.objects / sys.implementation.cache_tag
        self.own_objects.mkdir(parents=True, exist_ok=True)
        lines = [
            RULES.format(
                compile=ninja_command(*cxx, *COMPILE_FLAGS, *WARNINGS, "-Icsrc"),
                bindings=ninja_command(*bindings),
                extra=ninja_command(*extra_compile),
                link=ninja_command(*cxx, "-shared", "-pthread", *extra_link),
            ),
            f"builddir = {ninja_path(self.objects)}",
        ]
        if self.cuda is not None:
            nvcc = self.cuda.compile_command(cxx, WARNINGS)
            lines.append(CUDA_RULE.format(compile=ninja_command(*nvcc)))
        for ext in self.extensions:
            lines += self.statements(ext)
        build_file = self.own_objects / "build.ninja"
        build_file.write_text("\n".join(lines) + "\n", encoding="utf-8")

        command = [str(Path(ninja.BIN_DIR, "ninja")), "-f", str(build_file)]
        if self.parallel:
            command += ["-j", str(self.parallel)]
        # Within make it is told of jobs that make keeps to itself, and says so.
        environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
        if subprocess.run(command, env=environment).returncode != 0:
            way_out = "; NANOTRON_FAST_CUDA=0 builds without CUDA" if self.cuda else ""
            raise CompileError(f"compilation failed, see the messages above{way_out}")

    def statements(self, ext: Extension) -> list[str]:
        """What ninja has to know of one extension."""
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines, objects = [], []
        for source in ext.sources:
            rule, folder = "compile", self.objects
            if source.endswith(".cu"):
                rule = "compile_cuda"
            elif Path(source).name == BINDINGS:
                rule, folder = "compile_bindings", self.own_objects
            objects.append(ninja_path(folder / Path(source + ".o")))
            lines.append(f"build {objects[-1]}: {rule} {ninja_path(source)}")
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
        if ext.name == setup_cuda.MODULE:
            # Its own copy of the runtime, out of sight of the one that torch brings.
            runtime = ninja_command(str(self.cuda.runtime))
            lines.append(f"  libraries = {runtime} -Wl,--exclude-libs,ALL -ldl -lrt")
        return lines


setup(
    # nanotron_fast/kernels is a link, so that the tree works where it is not installed: left out
    # here, or its files would be packaged under both of their paths.
    packages=[
        *find_packages(include=["nanotron_fast*"], exclude=["nanotron_fast.kernels*"]),
        "nanotron_fast.kernels",
        *(f"nanotron_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"nanotron_fast.kernels": "kernels"},
    package_data={
        "nanotron_fast": ["py.typed", "*.pyi"],
        # What was measured on GPUs, where it was.
        "nanotron_fast.kernels": ["measured/*.json"],
    },
    ext_modules=[Extension("nanotron_fast._C", SOURCES, language="c++")],
    cmdclass={"build_ext": NinjaBuildExt},
)
