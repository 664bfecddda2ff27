"""Builds `nanotron_fast._C`, and `nanotron_fast._cuda` where there is a CUDA compiler.

Everything else about the package is in pyproject.toml. Environment variables:

- CXX, CXXFLAGS, LDFLAGS: the C++ compiler and what it is told besides;
- NANOTRON_FAST_CUDA: 0 leaves the packer for GPUs out, 1 makes a missing nvcc an error;
- CUDA_HOME: where CUDA is, if neither on PATH, in /usr/local/cuda nor among Python's packages;
- NVCC_CCBIN: the C++ compiler that nvcc uses, if not CXX.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from itertools import chain
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

COMPILE_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow"]
SOURCES = sorted(glob("csrc/bindings.cpp") + glob("csrc/core/*.cpp") + glob("csrc/cast/*.cpp"))
CUDA_MODULE = "nanotron_fast._cuda"
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
# Later ones run the code of the newest of these that the compiler knows, made from its PTX.
CUDA_ARCHITECTURES = (80, 90, 100)

RULES = """\
ninja_required_version = 1.5
rule compile
  command = {compile} -MMD -MF $out.d -c $in -o $out
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


def find_nvcc() -> Path | None:
    """The CUDA compiler: CUDA_HOME's alone where that is set, else the first that is there."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home, "bin", "nvcc")] if home else []
    if not home:
        on_path = shutil.which("nvcc")
        candidates += [Path(on_path)] if on_path else []
        candidates.append(Path("/usr/local/cuda/bin/nvcc"))
        for folder in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
            candidates += sorted(Path(folder or ".").glob("nvidia/*/bin/nvcc"))
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


class Cuda:
    """A CUDA compiler: the architectures it knows, and where its static runtime is."""

    def __init__(self, nvcc: Path) -> None:
        self.nvcc = nvcc
        # Its own word for where it is: what is on PATH may be a script that calls another.
        dry_run = self._output("--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)
        top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE)
        self.home = Path(top[1].strip() if top else nvcc.parents[1]).resolve()
        known = set(re.findall(r"compute_(\d+)\b", self._output("--list-gpu-arch")))
        self.architectures = [arch for arch in CUDA_ARCHITECTURES if str(arch) in known]
        folders = ("lib64", "lib", "targets/*/lib", "../cuda_runtime/lib")
        archives = (self.home.glob(f"{folder}/libcudart_static.a") for folder in folders)
        found = list(chain.from_iterable(archives))
        self.runtime = found[0] if found else None

    @property
    def lack(self) -> str:
        """What it cannot do without and has not; empty where it has everything."""
        if not self.architectures:
            return f"any of the architectures {CUDA_ARCHITECTURES}"
        return "" if self.runtime else "libcudart_static.a"

    def _output(self, *options: str) -> str:
        done = subprocess.run([self.nvcc, *options], capture_output=True, text=True)
        return done.stdout + done.stderr

    def compile_command(self, cxx: list[str]) -> list[str]:
        flags = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += [f"-Xcompiler={','.join(WARNINGS)}"]
        for arch in self.architectures:
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        newest = self.architectures[-1]
        flags += ["-gencode", f"arch=compute_{newest},code=compute_{newest}", "--threads=0"]
        # Pip's packages have the runtime's headers in a folder of their own.
        headers = self.home.parent / "cuda_runtime" / "include"
        flags += ["-isystem", str(headers)] if headers.is_dir() else []
        flags += [] if "NVCC_CCBIN" in os.environ or len(cxx) > 1 else ["-ccbin", cxx[0]]
        return [str(self.nvcc), *flags]


def find_cuda() -> Cuda | None:
    """The CUDA compiler to build with. Raises CompileError where one is demanded and missing."""
    wish = os.environ.get("NANOTRON_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise CompileError(f"NANOTRON_FAST_CUDA={wish}: set it to 0 or 1, or not at all")
    nvcc = None if wish == "0" else find_nvcc()
    cuda = None if nvcc is None else Cuda(nvcc)
    if cuda is not None and not cuda.lack:
        return cuda
    if cuda is not None:
        problem = f"{nvcc} lacks {cuda.lack}"
    else:
        problem = (
            "there is no nvcc on PATH, in /usr/local/cuda or among Python's nvidia packages "
            "(where CUDA_HOME is set, only there)"
        )
    if wish == "1":
        raise CompileError(f"NANOTRON_FAST_CUDA=1: {problem}")
    if cuda is not None:
        print(f"nanotron_fast._cuda is left out: {problem}", file=sys.stderr)
    return None


def ninja_path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_command(*words: str) -> str:
    return shlex.join(words).replace("$", "$$")


class NinjaBuildExt(build_ext):
    """Compiles in parallel, and only what changed: ninja knows the headers from depfiles."""

    def finalize_options(self) -> None:
        # Here, not in setup(): only a build asks for compilers.
        self.cuda = find_cuda()
        modules = self.distribution.ext_modules
        if self.cuda is not None and all(module.name != CUDA_MODULE for module in modules):
            modules.append(Extension(CUDA_MODULE, CUDA_SOURCES, language="c++"))
        super().finalize_options()

    def build_extensions(self) -> None:
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
        lines = [
            RULES.format(
                compile=ninja_command(*cxx, *COMPILE_FLAGS, *WARNINGS, *includes, *extra_compile),
                link=ninja_command(*cxx, "-shared", "-pthread", *extra_link),
            ),
            f"builddir = {ninja_path(folder)}",
        ]
        if self.cuda is not None:
            lines.append(CUDA_RULE.format(compile=ninja_command(*self.cuda.compile_command(cxx))))
        for ext in self.extensions:
            lines += self.statements(ext, folder)
        build_file = folder / "build.ninja"
        build_file.write_text("\n".join(lines) + "\n", encoding="utf-8")

        command = [str(Path(ninja.BIN_DIR, "ninja")), "-f", str(build_file)]
        if self.parallel:
            command += ["-j", str(self.parallel)]
        if subprocess.run(command).returncode != 0:
            way_out = "; NANOTRON_FAST_CUDA=0 builds without CUDA" if self.cuda else ""
            raise CompileError(f"compilation failed, see the messages above{way_out}")

    def statements(self, ext: Extension, folder: Path) -> list[str]:
        """What ninja has to know of one extension."""
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines, objects = [], []
        for source in ext.sources:
            objects.append(ninja_path(folder / Path(source + ".o")))
            rule = "compile_cuda" if source.endswith(".cu") else "compile"
            lines.append(f"build {objects[-1]}: {rule} {ninja_path(source)}")
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
        if ext.name == CUDA_MODULE:
            # Its own copy of the runtime, out of sight of the one that torch brings.
            runtime = ninja_command(str(self.cuda.runtime))
            lines.append(f"  libraries = {runtime} -Wl,--exclude-libs,ALL -ldl -lrt")
        return lines


setup(
    # nanotron_fast/kernels is a link, so that the tree works where it is not installed: left out
    # here, or its files would be packaged under both of their paths.
    packages=[
        *find_packages(include=["nanotron_fast*"], exclude=["nanotron_fast.kernels"]),
        "nanotron_fast.kernels",
    ],
    package_dir={"nanotron_fast.kernels": "kernels"},
    package_data={"nanotron_fast": ["py.typed", "*.pyi"]},
    ext_modules=[Extension("nanotron_fast._C", SOURCES, language="c++")],
    cmdclass={"build_ext": NinjaBuildExt},
)
