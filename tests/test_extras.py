"""Each package that not all uses need is taken away in turn: who needs it says so in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.errors import MissingPackageError
from nanotron_fast.extras import EXTRAS, is_installed, require
from tests.modelzoo import make

ROOT = Path(__file__).resolve().parents[1]
LOGITS = ["verify", "no-such-a", "no-such-b", "--logits", "--family", "nonsense"]
# What a command line needs: the extra, and those of its packages that are asked for.
COMMANDS: list[tuple[list[str], str, tuple[str, ...]]] = [
    (["train"], "train", EXTRAS["train"]),
    (["train", "no-such.yaml", "--no.such=1"], "train", EXTRAS["train"]),
    (["generate"], "train", EXTRAS["train"]),
    (["tokenize", "--workers", "many"], "train", ("transformers",)),
    (["run"], "kernels", EXTRAS["kernels"]),
    (["run", "no-such-script.py", "--help"], "kernels", EXTRAS["kernels"]),
    (["plot"], "plot", EXTRAS["plot"]),
    (LOGITS, "logits", EXTRAS["logits"]),
    (["convert", "s3://bucket/a", "b", "--family", "nonsense"], "s3", EXTRAS["s3"]),
    (["convert", "no-such", "s3://bucket/b"], "s3", EXTRAS["s3"]),
    (["convert", "hf://a/b", "b", "--dry-run"], "s3", ("fsspec",)),
    (["verify", "no-such", "s3a://bucket/b"], "s3", EXTRAS["s3"]),
    (["inspect", "s3://bucket/b"], "s3", EXTRAS["s3"]),
    *(
        ([*command, *options, "--family", "nonsense"], "s3", EXTRAS["s3"])
        for command, options in (
            (["convert", "no-such", "b"], ["--tokenizer", "s3://bucket/a"]),
            (["convert", "no-such", "b"], ["--like=S3A://bucket/a"]),
            (["verify", "no-such", "no-such"], ["--like", "s3://bucket/a"]),
            (["inspect", "no-such"], ["--like", "s3://bucket/a"]),
        )
    ),
    (["convert", "no-such", "b", "--tokenizer", "hf://a/b"], "s3", ("fsspec",)),
]
STATEMENTS: list[tuple[str, str, tuple[str, ...]]] = [
    *(
        (f"import nanotron_fast; nanotron_fast.{name}", "kernels", EXTRAS["kernels"])
        for name in ("load_into", "enable", "disable", "status", "enable_transformers")
    ),
    *(
        (f"import nanotron_fast.{name}", "kernels", EXTRAS["kernels"])
        for name in ("auto", "parallel", "kernels", "kernels.rms_norm", "kernels.rope.tables")
    ),
    ("from nanotron_fast.models import build", "kernels", EXTRAS["kernels"]),
    ("from nanotron_fast.train import Trainer", "train", EXTRAS["kernels"]),
    ("import nanotron_fast as nf; nf.verify('a', 'b', logits=True)", "logits", EXTRAS["logits"]),
    (
        "from nanotron_fast.checkpoints.remote.store import Store; Store.at('s3://bucket/a')",
        *("s3", EXTRAS["s3"]),
    ),
]
# In children of one process, which starts once: what each says and how it ends.
RUN = """
import json, os, sys, tempfile
from nanotron_fast.__main__ import main
# What needs none of the packages is imported once for all children.
import nanotron_fast.cli.commands, nanotron_fast.checkpoints.convert, nanotron_fast.models.verifying
import nanotron_fast.checkpoints.inspect, nanotron_fast.cli.reporting
import nanotron_fast.checkpoints.plan.to_nanotron, nanotron_fast.checkpoints.carrying_out
assert not {"torch", "triton", "transformers", "safetensors", "fsspec"} & set(sys.modules)

def child(packages, words, statement):
    sys.modules.update(dict.fromkeys(packages))
    if statement is None:
        sys.argv = ["nanotron-fast", *words]
        main()
    try:
        exec(statement)
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(2)
    os._exit(0)

found = []
for case in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                child(*case)
            except SystemExit as ended:
                sys.stderr.flush()
                os._exit(ended.code)
            finally:
                os._exit(99)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        found.append([code, said.read()])
print(json.dumps(found))
"""


def outcomes(cases: list[tuple[list[str], list[str], str | None]], folder: Path) -> list[Any]:
    """For each of (packages taken away, command line, statement): exit code, and what was said."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(cases),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_command_says_what_to_install_before_it_reads_its_arguments(tmp_path: Path) -> None:
    cases = [(each, words, extra) for words, extra, packages in COMMANDS for each in packages]
    found = outcomes([([package], words, None) for package, words, _ in cases], tmp_path)
    for (package, words, extra), (code, said) in zip(cases, found, strict=True):
        line = f"needs {package}, not installed here: pip install 'nanotron_fast[{extra}]'\n"
        assert said.startswith("error: "), (words, said)
        assert said.endswith(line), (words, said)
        assert said.count("\n") == 1, (words, said)
        assert code == 2, (words, said)


def test_each_import_says_what_to_install(tmp_path: Path) -> None:
    cases = [(each, code, extra) for code, extra, packages in STATEMENTS for each in packages]
    found = outcomes([([package], [], code) for package, code, _ in cases], tmp_path)
    for (package, statement, extra), (code, said) in zip(cases, found, strict=True):
        line = f"needs {package}, not installed here: pip install 'nanotron_fast[{extra}]'\n"
        assert said.startswith("MissingPackageError: "), (statement, said)
        assert said.endswith(line), (statement, said)
        assert said.count("\n") == 1, (statement, said)
        assert code == 2, (statement, said)


def test_what_needs_none_of_them_works_without_any(tmp_path: Path, golden_hf: Path) -> None:
    """Help can be had too, and what a run would come to."""
    words = [
        ["convert", str(golden_hf), str(tmp_path / "out"), "--tp", "2"],
        ["verify", str(golden_hf), str(tmp_path / "out")],
        ["inspect", str(tmp_path / "out")],
        ["env"],
        ["train", "--help"],
        ["generate", "-h"],
    ]
    packages = sorted({name for names in EXTRAS.values() for name in names})
    lines = [
        "from nanotron_fast.models import Architecture, facts_of",
        "from nanotron_fast.train import TrainingConfig",
        "import nanotron_fast as nf",
        f"nf.convert({str(golden_hf)!r}, {str(tmp_path / 'face')!r})",
    ]
    cases = [(packages, each, None) for each in words]
    found = outcomes([*cases, (packages, [], "\n".join(lines))], tmp_path)
    for each, (code, said) in zip([*words, lines], found, strict=True):
        assert code == 0, (each, said)


def test_all_that_is_missing_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "triton", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError) as raised:
        require("train", "this")
    assert str(raised.value) == (
        "this needs torch, triton and transformers, not installed here: "
        "pip install 'nanotron_fast[train]'"
    )
    assert isinstance(raised.value, ImportError)
    assert isinstance(raised.value, nf.NanotronFastError)
    assert raised.value.name == "torch"


def test_triton_is_asked_for_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not is_installed("triton")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert is_installed("triton")


def test_pyproject_has_the_extras_that_messages_name() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: {re.split(r"[<>=;\s]", line)[0] for line in lines}
        for name, lines in project["optional-dependencies"].items()
    }
    for name, packages in EXTRAS.items():
        assert set(packages) <= extras[name], name
    needless = {name for packages in EXTRAS.values() for name in packages}
    assert not any(line.startswith(tuple(needless)) for line in project["dependencies"])
    assert extras["all"] == {f"nanotron_fast[{','.join(sorted({*EXTRAS, 'bench'}))}]"}


def test_a_conversion_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    """A third of the time of a small model's is imports: what few conversions need waits."""
    make("llama").save(tmp_path / "hf")
    convert = (
        "import sys, nanotron_fast as nf; nf.convert(*sys.argv[1:]); "
        "print(*(name.removeprefix('nanotron_fast.') for name in sys.modules))"
    )
    unneeded = {
        *("concurrent.futures", "random", "socket", "tempfile", "torch"),
        *("formats.dcp.writing", "formats.nanotron.optimizer", "formats.torch_file"),
    }
    for names in (("hf", "nanotron"), ("nanotron", "back")):
        paths = [str(tmp_path / name) for name in names]
        done = subprocess.run(
            [sys.executable, "-c", convert, *paths], check=True, capture_output=True, text=True
        )
        assert not unneeded & set(done.stdout.split())
