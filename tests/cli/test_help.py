"""Help at several widths, with colours and without; and the examples that end it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from nanotron_fast.cli.commands import app
from nanotron_fast.cli.entry import EXIT_CODES
from nanotron_fast.cli.examples import EXAMPLES
from nanotron_fast.cli.help import shell_lines

GROUP: Any = get_command(app)
COMMANDS: dict[str, Any] = dict(GROUP.commands)
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command line prints, at a width."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def show(*words: str, width: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit) as ended:
            GROUP.main(list(words), prog_name="nanotron-fast")
        assert ended.value.code == 0
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_its_whole_name_and_its_text(name: str, width: int, shown: Any) -> None:
    text = shown(name, "--help", width=width)
    assert all(len(line) <= min(width, 100) for line in text.splitlines()), text
    flowing = " ".join(text.split())
    for each in COMMANDS[name].params:
        if each.param_type_name == "argument":
            assert each.name.upper() in flowing or each.metavar in flowing
        for word in (*each.opts, *each.secondary_opts):
            if each.param_type_name == "option":
                assert re.search(rf"^  (?:.* )?{word}(?:[ ,]|$)", text, re.MULTILINE), word
        assert " ".join(each.help.split()) in flowing, each.name


@pytest.mark.parametrize("width", [40, 60, 80])
def test_all_commands_fit(width: int, shown: Any) -> None:
    text = shown("-h", width=width)
    assert all(len(line) <= width for line in text.splitlines() if "nanotron-fast" not in line)
    for name in COMMANDS:
        assert re.search(rf"^  {name}(?: +\S|$)", text, re.MULTILINE)
    flowing = " ".join(text.split())
    for code, meaning in EXIT_CODES:
        assert f"{code} {meaning}" in flowing
    assert "-V, --version" in text


def test_what_most_need_comes_first(shown: Any) -> None:
    text = shown("convert", "--help")
    headings = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert headings == [
        "Arguments",
        "Options",
        "How it runs",
        "Tensors and files",
        "Nanotron's details",
        "Examples",
    ]
    places = [text.index(f"\n  {each}") for each in ("--tp", "--dry-run", "--resume", "--target")]
    assert places == sorted(places)


def test_defaults_are_told(shown: Any) -> None:
    flowing = " ".join(shown("tokenize", "--help").split())
    assert "--tokenizer DIR_OR_ID For transformers' AutoTokenizer. (required)" in flowing
    assert "that it adds of itself. (default: --eos)" in flowing
    flowing = " ".join(shown("convert", "--help").split())
    assert "--tp N Tensor-parallel ranks to write for. (default: 1)" in flowing
    assert flowing.count("(default: 5GB)") == 1
    assert "--workers N Threads. (default: one a core, 16 at most) --" in flowing


def test_colours_are_a_terminals_alone(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = shown("convert", "--help")
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = shown("convert", "--help")
    assert "\x1b[" in coloured
    assert ANSI.sub("", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown("convert", "--help") == plain
    monkeypatch.delenv("FORCE_COLOR")
    assert shown("convert", "--help") == plain


def test_a_terminal_gets_colours(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[" in shown("--help")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in shown("--help")


def test_no_words_at_all_is_help_and_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        GROUP.main([], prog_name="nanotron-fast")
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert "Usage: nanotron-fast [OPTIONS] COMMAND ..." in err


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_the_version(word: str, shown: Any) -> None:
    assert re.fullmatch(r"nanotron-fast \d+\.\d+\.\d+\n", shown(word))


def test_every_command_has_examples_that_are_read() -> None:
    assert set(EXAMPLES) == {"", *COMMANDS}
    for name, examples in EXAMPLES.items():
        for example in examples:
            words = shlex.split(example.command)
            if words[0] == "torchrun":
                assert words[2:4] == ["-m", "nanotron_fast"]
                words = words[3:]
            assert not name or words[1] == name
            COMMANDS[words[1]].make_context(words[1], words[2:])


def test_examples_are_shown_as_a_shell_takes_them(shown: Any) -> None:
    for name in EXAMPLES:
        text = shown(*([name] if name else []), "--help", width=60)
        joined = re.sub(r" \\\n +", " ", text)
        for example in EXAMPLES[name]:
            assert f"\n    {example.command}\n" in f"{joined}\n"
    assert shell_lines("a --b 'c d' \"e f\"", 12, 2) == ["  a --b \\", "    'c d' \\", '    "e f"']


def test_the_documents_have_the_exit_codes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    told = re.findall(r"^\| (\d[\d, ]*) \|", text, re.MULTILINE)
    assert told == [code for code, _ in EXIT_CODES]
