"""Command lines that are no good: one line that says what may have been meant, and exit code 2."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command

from nanotron_fast.cli.commands import app
from nanotron_fast.words import closest

GROUP: Any = get_command(app)
NO_OPTION = "has no such option"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("convert a b --dtyp x", f"--dtyp: convert {NO_OPTION}; did you mean --dtype?"),
        (
            "convert a b --vocab_size 3",
            f"--vocab_size: convert {NO_OPTION}; did you mean --vocab-size?",
        ),
        (
            "convert a b --rope-interleave",
            f"--rope-interleave: convert {NO_OPTION}; did you mean --rope-interleaved?",
        ),
        (
            "convert a b -t 2",
            f"-t: convert {NO_OPTION}; did you mean --target, --to, --tokenizer or --tp?",
        ),
        (
            "convert a b --nonsense",
            f"--nonsense: convert {NO_OPTION}; nanotron-fast convert --help lists them",
        ),
        ("inspect a --tp 2", f"--tp: inspect {NO_OPTION}; convert and reshard have it"),
        ("inspect a --prompt x", f"--prompt: inspect {NO_OPTION}; generate has it"),
        ("--verson", "--verson: nanotron-fast has no such option; did you mean --version?"),
        ("run --cpus x.py", f"--cpus: run {NO_OPTION}; did you mean --cpu?"),
        ("train x.yaml --dryrun", f"--dryrun: train {NO_OPTION}; did you mean --dry-run?"),
        ("train x.yaml --memry=80GB", f"--memry: train {NO_OPTION}; did you mean --memory?"),
        ("train x.yaml --lr=1", f"--lr: train {NO_OPTION}; keys are set by --section.key=VALUE"),
        ("conver a b", "conver: there is no such command; did you mean convert?"),
        ("frobnicate", "frobnicate: there is no such command; nanotron-fast --help lists them"),
        ("convert a", "DST: it is missing; usage: nanotron-fast convert [OPTIONS] SRC DST"),
        ("plot", "RUN: it is missing; usage: nanotron-fast plot [OPTIONS] RUN..."),
        ("generate a", "--prompt: it is missing; usage: nanotron-fast generate [OPTIONS] CKPT"),
        ("run", "SCRIPT: it is missing; usage: nanotron-fast run [OPTIONS] SCRIPT ..."),
        ("inspect a b", "b: more than is taken; usage: nanotron-fast inspect [OPTIONS] PATH"),
        ("convert a b --workers 0", "--workers: 0 is not in the range x>=1"),
        ("convert a b --workers two", "--workers: 'two' is no whole number"),
        ("convert a b --tp two", "--tp: 'two' is no whole number"),
        ("generate a --prompt b --top-p high", "--top-p: 'high' is no number"),
        ("convert a b --tp", "--tp: it needs a value"),
        ("convert a b --fsync=3", "--fsync: it takes no value"),
    ],
)
def test_one_line_says_it(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        GROUP.main(words.split(" "), prog_name="nanotron-fast")
    assert (ended.value.code, *capsys.readouterr()) == (2, "", f"error: {line}\n")


def test_every_command_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """Some versions of typer hand None to the command instead, with some of click."""
    asked = 0
    for name, command in GROUP.commands.items():
        required = [each for each in command.params if each.required]
        if not required:
            continue
        with pytest.raises(SystemExit) as ended:
            GROUP.main([name], prog_name="nanotron-fast")
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, ""), name
        assert ": it is missing; usage: nanotron-fast " in err, (name, err)
        asked += 1
    assert asked >= 5


def test_a_word_of_others_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["con\nver\x1b[1m"], ["inspect", "a", "--b\nc"], ["inspect", "a", "b\nc\x1b[1m"]):
        with pytest.raises(SystemExit) as ended:
            GROUP.main(words, prog_name="nanotron-fast")
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
        assert "\x1b" not in err


def test_what_is_near() -> None:
    known = ["--overwrite", "--overwrite-partial", "--tp", "--to", "--no-eos"]
    assert closest("--overwite", known) == ["--overwrite"]
    assert closest("--overwrite-partal", known) == ["--overwrite-partial"]
    assert closest("--tq", known) == []
    assert closest("--no-eso", known) == ["--no-eos"]
    assert closest("--anything", []) == []
    assert closest("vocabsize", ["vocab_size", "max_shard_size"]) == ["vocab_size"]
