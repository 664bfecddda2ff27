"""`nanotron-fast doctor`: each fault that it knows, made here, is found with a way to mend it."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanotron_fast import _C
from nanotron_fast.checkpoints import io_modes
from nanotron_fast.cli import doctor, doctor_files, needs
from nanotron_fast.cli.commands import app
from nanotron_fast.cli.doctor import diagnose
from nanotron_fast.cli.findings import Finding
from nanotron_fast.errors import ConfigError, MissingPackageError

Patch = pytest.MonkeyPatch


def found(name: str, place: Path) -> Finding:
    """The last finding of a name."""
    return [each for each in diagnose(place).findings if each.name == name][-1]


def test_what_is_fine_needs_no_mending(tmp_path: Path) -> None:
    diagnosis = diagnose(tmp_path)
    assert diagnosis.is_usable
    for each in diagnosis.findings:
        assert (each.state == "ok") == (each.remedy == ""), each
        assert each.found
    assert list(tmp_path.iterdir()) == []
    names = [each.name for each in diagnosis.findings]
    for name in ("engine", "casts", "hashes", "torch", "destination", "flock", "memory", "cores"):
        assert name in names


def test_the_command_prints_it_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (ended.value.code, document["usable"]) == (0, True)
    for each in document["findings"]:
        assert set(each) == {"name", "state", "found", "remedy"}
    with pytest.raises(SystemExit) as ended:
        app(["doctor"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for each in document["findings"]:
        assert f"{each['state']:<9}{each['name']}" in out
        assert not each["remedy"] or f"to mend it: {each['remedy']}" in out
    assert out.endswith(": checkpoints can be converted here\n")


def test_what_triton_is_for_names_every_command_that_asks_for_it(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    told = found("triton", tmp_path).found
    for name, *options in (["train"], ["generate"], ["run"], ["verify", "--logits"]):
        with pytest.raises(MissingPackageError, match="needs triton"):
            needs.check([name, *options])
        assert " ".join([name, *options]) in told
    assert "on a CPU too" in told


def test_a_place_that_is_not_there_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["doctor", str(tmp_path / "no")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no'}: there is no such directory\n"


def test_an_engine_that_cannot_be_imported_is_exit_code_1() -> None:
    """As of an installation for another Python; the command itself still starts."""
    code = (
        "import sys; sys.modules['nanotron_fast._C'] = None\n"
        "sys.argv = ['nanotron-fast', 'doctor']\n"
        "from nanotron_fast.cli import doctor\n"
        "doctor._accelerator = lambda: []\n"
        "from nanotron_fast.cli.commands import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("broken   engine           the native engine cannot be imported")
    assert done.stdout.endswith(": nothing can work here\n")


@pytest.mark.parametrize(
    ("variable", "levels", "name", "state", "words"),
    [
        ("", ["scalar"], "casts", "slow", "scalar"),
        ("scalar", ["scalar", "avx2"], "casts", "slow", "can do avx2"),
        ("avx2", ["scalar", "avx2"], "casts", "ok", "avx2"),
        ("mmx", ["scalar", "avx2"], "engine", "broken", "NANOTRON_FAST_SIMD=mmx is none of"),
    ],
)
def test_instructions(
    variable: str,
    levels: list[str],
    name: str,
    state: str,
    words: str,
    monkeypatch: Patch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(_C, "simd_levels", lambda: levels)
    monkeypatch.setenv("NANOTRON_FAST_SIMD", variable)
    each = found(name, tmp_path)
    assert each.state == state
    assert words in each.found


def hide(monkeypatch: Patch, *names: str) -> None:
    """As if packages were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in names else find(name))


def test_packages_that_are_missing(monkeypatch: Patch, tmp_path: Path) -> None:
    hide(monkeypatch, *(package.name for package in doctor.PACKAGES))
    diagnosis = diagnose(tmp_path)
    assert diagnosis.is_usable
    extras = metadata.metadata("nanotron_fast").get_all("Provides-Extra") or []
    for package in doctor.PACKAGES:
        (each,) = [each for each in diagnosis.findings if each.name == package.name]
        wanted = f"'nanotron_fast[{package.extra}]'" if package.extra in extras else package.name
        assert (each.state, each.remedy) == ("missing", f"pip install {wanted}")
        assert package.purpose in each.found
    hide(monkeypatch, "yaml")
    assert not diagnose(tmp_path).is_usable
    assert found("pyyaml", tmp_path).remedy == "pip install pyyaml"


def refuse(code: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("module", "call", "code", "name", "state"),
    [
        (fcntl, "flock", errno.ENOTSUP, "flock", "missing"),
        (fcntl, "fcntl", errno.EINVAL, "O_DIRECT", "slow"),
        (os, "ftruncate", errno.EFBIG, "large files", "missing"),
    ],
)
def test_what_a_file_system_refuses(
    module: Any,
    call: str,
    code: int,
    name: str,
    state: str,
    monkeypatch: Patch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(module, call, refuse(code))
    for each in doctor_files.findings(tmp_path):
        assert each.state == (state if each.name == name else "ok"), each
        assert each.name != name or os.strerror(code) in each.found


def test_a_limit_of_file_sizes_is_found(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**9, limits[1]))
    try:
        (each,) = [e for e in doctor_files.findings(tmp_path) if e.name == "large files"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert each.state == "missing"
    assert "ulimit -f unlimited" in each.remedy


def test_a_folder_that_cannot_be_written_to() -> None:
    (each,) = doctor_files.findings(Path("/proc"))
    assert (each.name, each.state) == ("destination", "missing")
    assert each.found.startswith("/proc cannot be written to: ")


def test_little_room_and_little_memory(monkeypatch: Patch, tmp_path: Path) -> None:
    little = SimpleNamespace(f_bavail=1000, f_blocks=16000, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: little)
    monkeypatch.setattr(io_modes, "available_bytes", lambda: 10**8)
    told = {each.name: each for each in diagnose(tmp_path).findings}
    assert "4.1 MB free" in told["destination"].found
    assert "65.5 MB in /dev/shm" in told["shared memory"].found
    assert told["memory"].found == "100 MB free"
    states = [told[name].state for name in ("destination", "shared memory", "memory")]
    assert states == ["missing", "slow", "slow"]
    little.f_blocks = little.f_bavail = 0
    [found] = [each for each in diagnose(tmp_path).findings if each.name == "destination"]
    assert (found.state, found.found) == ("ok", f"{tmp_path}, which says no size")


@pytest.mark.parametrize(
    ("cuda", "has_driver", "state", "words"),
    [
        (None, False, "slow", "none: training"),
        (None, True, "missing", "is built for CPUs alone"),
        ("13.0", True, "missing", "sees no GPU"),
    ],
)
def test_no_gpu(
    cuda: str | None,
    has_driver: bool,
    state: str,
    words: str,
    monkeypatch: Patch,
    tmp_path: Path,
) -> None:
    driver = tmp_path / "version"
    if has_driver:
        driver.write_text("NVRM version")
    monkeypatch.setattr(doctor, "_DRIVER", driver)
    torch = SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: False),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "torch" or None)
    (each,) = doctor._accelerator()
    assert each.name == "GPU"
    assert each.state == state
    assert words in each.found


@pytest.mark.parametrize("has_compiler", [False, True])
def test_with_a_gpu(has_compiler: bool, monkeypatch: Patch, tmp_path: Path) -> None:
    card = SimpleNamespace(name="H200", major=9, minor=0, total_memory=140 * 10**9)
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda _: card
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "nanotron_fast._cuda", None)
    monkeypatch.delattr("nanotron_fast._cuda", raising=False)
    monkeypatch.setattr(doctor, "find_spec", lambda _: True)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if has_compiler else None)
    header = tmp_path / "Python.h"
    header.write_text("")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    told = {each.name: each for each in doctor._accelerator()}
    assert told["GPU"].found == "H200, sm_90, 140.00 GB"
    assert (told["packer"].state, "nvcc" in told["packer"].remedy) == ("slow", True)
    if has_compiler:
        assert told["compiler"] == Finding("compiler", "ok", "/bin/gcc, for Triton")
        header.unlink()
        told = {each.name: each for each in doctor._accelerator()}
        assert "python3-dev" in told["compiler"].remedy
    else:
        assert told["compiler"].remedy == "install a C compiler (gcc)"
    assert (told["compiler"].state == "ok") == (told["compiler"].remedy == "")


def test_a_torch_that_cannot_be_imported(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "find_spec", lambda _: True)
    each = found("import torch", tmp_path)
    assert each.state == "missing"
    assert each.found.startswith("it cannot be imported: ")
    assert diagnose(tmp_path).is_usable


def test_the_documents_show_lines_that_there_are(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    shown = re.findall(r"^(ok|slow|missing|broken) +(\S.*?)  +\S", text, re.MULTILINE)
    assert len(shown) > 10
    names = [each.name for each in diagnose(tmp_path).findings]
    assert [name for _, name in shown] == [
        name for name in names if name in dict(map(reversed, shown))
    ]


def test_a_place_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="there is no such directory"):
        diagnose(tmp_path / "file")
