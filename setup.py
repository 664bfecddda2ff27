"""Builds `nanotron_fast._C`. Everything else about the package is in pyproject.toml."""

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

COMPILE_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow"]
SOURCES = sorted(glob("csrc/bindings.cpp") + glob("csrc/core/*.cpp") + glob("csrc/cast/*.cpp"))

RULES = """\
ninja_required_version = 1.5
rule compile
  command = {compile} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = {link} $in -o $out
  description = link $out
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

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        cxx = compiler()
        includes = ["-Icsrc"]
        # System headers, so that their warnings are not ours.
        for path in (pybind11.get_include(), sysconfig.get_path("include")):
            includes += ["-isystem", path]
        extra_compile = shlex.split(os.environ.get("CXXFLAGS", ""))
        extra_link = shlex.split(os.environ.get("LDFLAGS", ""))

        # Not build_temp: editable installs make that a temporary folder, and nothing is reused.
        folder = Path("build", f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)

        lines = [
            RULES.format(
                compile=ninja_command(*cxx, *COMPILE_FLAGS, *WARNINGS, *includes, *extra_compile),
                link=ninja_command(*cxx, "-shared", "-pthread", *extra_link),
            ),
            f"builddir = {ninja_path(folder)}",
        ]
        objects = []
        for source in ext.sources:
            objects.append(ninja_path(folder / Path(source).with_suffix(".o")))
            lines.append(f"build {objects[-1]}: compile {ninja_path(source)}")
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
        build_file = folder / "build.ninja"
        build_file.write_text("\n".join(lines) + "\n", encoding="utf-8")

        command = [str(Path(ninja.BIN_DIR, "ninja")), "-f", str(build_file)]
        if self.parallel:
            command += ["-j", str(self.parallel)]
        if subprocess.run(command).returncode != 0:
            raise CompileError(f"{ext.name}: compilation failed, see the messages above")


setup(
    packages=[*find_packages(include=["nanotron_fast*"]), "nanotron_fast.kernels"],
    package_dir={"nanotron_fast.kernels": "kernels"},
    package_data={"nanotron_fast": ["py.typed", "*.pyi"]},
    ext_modules=[Extension("nanotron_fast._C", SOURCES, language="c++")],
    cmdclass={"build_ext": NinjaBuildExt},
)
