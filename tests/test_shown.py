"""Every command that README and docs show is run, and prints what is shown, numbers aside.

A document's commands run in one folder, in their order. What they read is made when it is asked for
and not there: a small model under each name. torchrun's ranks are processes here, as many as fit.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

import nanotron_fast as nf
from nanotron_fast.cli.commands import app
from tests import forks
from tests.checkpoints.test_processes import ranks
from tests.modelzoo import make
from tests.test_guides import ROOT, blocks
from tests.train import configs
from tests.train.runs import SIZES as TINY
from tests.train.runs import train

GUIDE = ROOT / "docs" / "continue-pretraining.md"
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    if path != GUIDE and blocks(path, "console")
]
# What is not run here, by its first words, and why.
ELSEWHERE = {
    "make demo": "run before every change is merged, as are the next",
    "make test": "this is it",
    "make gpu": "tests/benchmarks",
    "torchrun --nnodes 4 --nproc-per-node 8 -m nanotron_fast convert ...": "arguments are left out",
    "torchrun --nproc_per_node=8 -m nanotron_fast run": "tests/nanotron",
    "sbatch": "tests/test_examples.py",
    "pip install": "tests/test_packaging.py",
}
# What a signal has a command print is held by tests/checkpoints/test_faults.py.
ENDED = "interrupted by "
REFUSED = "error: "
# Addresses that this machine has something at.
ADDRESSES = {"hf://org/model": "file://{here}/llama-hf", "s3://bucket/": "memory://bucket/"}
SHORT = {
    **TINY,
    "tokens__batch_accumulation_per_replica": 1,
    "model__model_config__num_hidden_layers": 1,
    "checkpoints__checkpoint_interval": 50,
}
SIZES = {"num_hidden_layers": 8, "num_key_value_heads": 8, "num_attention_heads": 8}


class Command(NamedTuple):
    """Its line, and what is shown of its output."""

    line: str
    shown: tuple[str, ...]


def commands(path: Path) -> list[Command]:
    found = []
    for block in blocks(path, "console"):
        for part in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            # What is in quotes goes on over lines.
            line = part.partition("\n")[0] if part.count('"', 0, part.find("\n")) % 2 == 0 else None
            if line is None:
                line = part[: part.index('"\n', part.index('"') + 1) + 1]
            shown = tuple(part[len(line) :].strip("\n").splitlines())
            found.append(Command(re.sub(r"\s+#.*$", "", line), shown))
    return found


def _model(name: str, family: str = "llama") -> Callable[[Path], None]:
    def write(here: Path) -> None:
        make(family, **SIZES, hidden_size=64).save(here / name)

    return write


def _converted(name: str, **choices: object) -> Callable[[Path], None]:
    def write(here: Path) -> None:
        ensure(here, "llama-hf")
        nf.convert(here / "llama-hf", here / name, **choices)  # type: ignore[arg-type]

    return write


def _trained(name: str) -> Callable[[Path], None]:
    def write(here: Path) -> None:
        ensure(here, "llama-hf")
        model = {"path": str(here / "llama-hf")}
        run = here / "made" / Path(name).parent
        train(run, tokens__train_steps=1, model__model_config=..., model__init_method=model)
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "1").rename(here / name)

    return write


def _configuration(here: Path) -> None:
    configs.save(here / "train.yaml", **SHORT)


def _llama_8b(here: Path) -> None:
    model = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    positions = {"max_position_embeddings": 8192}
    configs.save(
        here / "llama.yaml",
        model__model_config={"is_llama_config": True, **model, **heads, **positions},
        parallelism__dp=2,
        tokens__sequence_length=8192,
        tokens__micro_batch_size=1,
        tokens__batch_accumulation_per_replica=8,
        tokens__train_steps=1000,
        optimizer__zero_stage=1,
    )


MAKERS: dict[str, Callable[[Path], None]] = {
    "llama-hf": _model("llama-hf"),
    "TinyLlama-1.1B": _model("TinyLlama-1.1B"),
    "Qwen/Qwen2.5-7B": _model("Qwen/Qwen2.5-7B", "qwen2"),
    "meta-llama/Llama-2-7b-hf": _model("meta-llama/Llama-2-7b-hf"),
    "llama-405b": _model("llama-405b"),
    "rlhf-model": _model("rlhf-model"),
    "llama-nanotron": _converted("llama-nanotron"),
    "nanotron": _converted("nanotron"),
    "tp8": _converted("tp8", topology=nf.Topology(tp=8)),
    "outputs/checkpoint/step-1000": _converted(
        "outputs/checkpoint/step-1000", to="dcp", names="torchtitan"
    ),
    "run/1000": _trained("run/1000"),
    "run/checkpoints/1000": _trained("run/checkpoints/1000"),
    "train.yaml": _configuration,
    "llama.yaml": _llama_8b,
}


def is_given(here: Path) -> bool:
    """Whether the page itself says how to make all that its commands read."""
    return (here / "make_model.py").exists()


def ensure(here: Path, name: str) -> None:
    """Makes what a command reads, where it is not there."""
    if not (here / name).exists():
        assert name in MAKERS, f"{name}: nothing here makes it"
        MAKERS[name](here)


def prepare(here: Path, words: list[str]) -> None:
    """Makes what the command reads, and takes away what another has left where it writes."""
    command, *rest = words
    values = dict(pairwise(rest))
    given = [word for at, word in enumerate(rest) if not word.startswith("-") and at < 2]
    reads = given if command == "verify" else given[:1]
    for name in (*reads, *(values[each] for each in ("--like",) if each in values)):
        if "://" not in name:
            ensure(here, name)
    if command in ("convert", "reshard") and "--finish" not in rest:
        shutil.rmtree(here / given[1], ignore_errors=True)
    if command == "train" and not is_given(here):
        shutil.rmtree(here / "run", ignore_errors=True)


def pattern_of(shown: str) -> str:
    """What a shown line stands for: numbers, sizes and paths are others."""
    parts = re.split(r"(\d[\d,.:]*(?:e[+-]?\d+)?k?|\b(?:kB|MB|GB)\b|/data/|\.partial-\w+)", shown)
    result = ""
    for part in parts:
        if re.fullmatch(r"\d[\d,.:]*(?:e[+-]?\d+)?k?", part):
            result += r"\d[\d,.:]*(?:e[+-]?\d+)?k?"
        elif part in ("kB", "MB", "GB"):
            result += r"(?:bytes|B|kB|MB|GB)"
        elif part == "/data/":
            result += r"/\S+/"
        elif part.startswith(".partial-"):
            result += r"\.partial-\w+"
        else:
            result += re.sub(r"(?:\\ )+", r"\\s+", re.escape(part))
    return result


def check_output(command: Command, printed: str) -> None:
    lines = [line for line in printed.splitlines() if line.strip()]
    if command.shown and command.shown[0].startswith(ENDED):
        return
    if command.line.startswith("nanotron-fast generate"):
        assert printed  # whatever it says
        return
    is_of_one = not command.line.startswith("torchrun")
    at = 0
    for shown in filter(str.strip, command.shown):
        if shown == "...":
            continue
        pattern = pattern_of(shown)
        matching = [n for n in range(at, len(lines)) if re.fullmatch(pattern, lines[n].rstrip())]
        assert matching, f"{command.line}\nprints nothing like\n{shown}\nbut\n{printed}"
        if is_of_one:  # ranks, and their streams, have no order
            at = matching[0] + 1


def run(line: str, here: Path, capfd: pytest.CaptureFixture[str], wanted: int = 0) -> str:
    """What a command prints, to both streams. It has to end with the exit code that is wanted."""
    words = shlex.split(line)
    count = 1
    if words[0] == "torchrun":
        count = min(2, int(re.search(r"--nproc.per.node[= ](\d+)", line)[1]))  # type: ignore[index]
        words = words[words.index("-m") + 1 :] if "-m" in words else words
    if words[0] not in ("nanotron-fast", "nanotron_fast"):
        return other(words, here)
    for address, own in ADDRESSES.items():
        words = [word.replace(address, own.format(here=here)) for word in words]
    if "file://" in line or any("file://" in word for word in words):
        ensure(here, "llama-hf")
    prepare(here, words[1:])
    if count > 1:
        return by_ranks(words[1:], count, here)
    if "--share" in words:
        at = words.index("--share") + 1
        number, _, total = words[at].partition("/")
        for each in range(1, int(total) + 1):
            if each != int(number):  # done by other tasks of the array
                in_process([*words[1:at], f"{each}/{total}", *words[at + 1 :]], capfd)
    return in_process(words[1:], capfd, wanted)


def in_process(words: list[str], capfd: pytest.CaptureFixture[str], wanted: int = 0) -> str:
    capfd.readouterr()
    try:
        app(words, prog_name="nanotron-fast", standalone_mode=True)
        code: object = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert (code or 0) == wanted, out + err
    return err + out


def by_ranks(words: list[str], count: int, here: Path) -> str:
    """What processes print, which torchrun would have started."""
    if "train.yaml" in words and not is_given(here):
        configs.save(here / "two.yaml", **SHORT, parallelism__dp=count)
        words = [word.replace("train.yaml", "two.yaml") for word in words]
    (here / "rank.py").write_text(
        "import os, sys\n"
        f"os.chdir({str(here)!r})\n"
        "from nanotron_fast.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = forks.run((here / "rank.py", *words), ranks(count), here, 300)
    assert all(each.code == 0 for each in done), done
    return "".join(each.out + each.err for each in done)


def other(words: list[str], here: Path) -> str:
    """Runs Python, or a script of the repository, under this interpreter."""
    if words[0] == "torchrun":  # with a script
        words = words[next(at for at, word in enumerate(words) if word.endswith(".py")) :]
        name = words[1].partition("=")[2]
        ensure(here, name)
    script = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    done = subprocess.run(
        [sys.executable, *script[words[0] == "python" :]],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_of_a_document(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    num_run = 0
    for command in commands(path):
        if any(command.line.startswith(words) for words in ELSEWHERE):
            continue
        wanted = 2 if command.shown[:1] and command.shown[0].startswith(REFUSED) else 0
        check_output(command, run(command.line, tmp_path, capfd, wanted))
        num_run += 1
    assert num_run or all("make " in each.line for each in commands(path))


@pytest.mark.slow
def test_the_first_run_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "make_model.py").write_text(blocks(GUIDE, "python")[0])
    (tmp_path / "train.yaml").write_text(blocks(GUIDE, "yaml")[0])
    other(["python", "make_model.py"], tmp_path)
    for command in commands(GUIDE):
        if not any(command.line.startswith(words) for words in ELSEWHERE):
            check_output(command, run(command.line, tmp_path, capfd))
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == [
        "20",
        "25",
    ]
