"""What a shell completes: commands, options and the values that an option takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from nanotron_fast.checkpoints.options import Choices, described, spelled
from nanotron_fast.cli.commands import app
from nanotron_fast.errors import ConfigError
from nanotron_fast.families import family_names

GROUP: Any = get_command(app)
# Typer's name of it, in every version.
COMPLETE = "_NANOTRON_FAST_COMPLETE"


def completed(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Sequence[str]:
    """By the protocol of bash: what may stand for the last word of a command line."""
    monkeypatch.setenv(COMPLETE, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"nanotron-fast {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" "))))
    with pytest.raises(SystemExit) as ended:
        GROUP.main([], prog_name="nanotron-fast")
    assert ended.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("con", ["convert"]),
        ("t", ["train", "tokenize"]),
        ("convert --ov", ["--overwrite", "--overwrite-partial"]),
        ("convert a b --to ", ["nanotron", "hf", "dcp"]),
        ("convert a b --dtype b", ["bf16"]),
        ("convert a b --io d", ["direct", "dontcache"]),
        ("convert a b --target nanotron-", ["nanotron-fast"]),
        ("convert a b --names torch", ["torchtitan", "torchtitan-0.2"]),
        ("verify a --family qwen2", ["qwen2", "qwen2_moe"]),
        # Files, by the shell itself.
        ("convert ", []),
    ],
)
def test_bash_is_told(
    words: str,
    wanted: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(completed(words, monkeypatch, capsys)) == list(wanted)


def test_every_option_of_a_command_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, command in GROUP.commands.items():
        found = completed(f"{name} --", monkeypatch, capsys)
        options = [word for each in command.params for word in (*each.opts, *each.secondary_opts)]
        assert {each for each in options if each.startswith("--")} <= set(found), name


def test_what_is_completed_is_what_an_option_takes() -> None:
    """Beside --model-class, which is checked when the model is known."""
    values = {
        name: (option, option.values())
        for name, option in described(Choices).items()
        if option.values is not None
    }
    assert set(values) >= {"to", "dtype", "family", "target", "checkpoint_version", "names"}
    assert values["family"][1] == family_names()
    for name, (option, known) in values.items():
        for value in known:
            option.check(spelled(name), value)
        if name != "model_class":
            with pytest.raises(ConfigError):
                option.check(spelled(name), "none-of-them")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(
    shell: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for option in ("--show-completion", "--install-completion"):
        with pytest.raises(SystemExit) as ended:
            GROUP.main([option], prog_name="nanotron-fast")
        out, err = capsys.readouterr()
        assert (ended.value.code, err) == (0, "")
        assert COMPLETE in out or option == "--install-completion"
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(COMPLETE in text for text in written) == 1


def test_where_there_is_no_such_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 is that of a difference."""
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("csh", "/bin/csh"))
    for option in ("--show-completion", "--install-completion"):
        with pytest.raises(SystemExit) as ended:
            GROUP.main([option], prog_name="nanotron-fast")
        assert ended.value.code == 2
        assert capsys.readouterr().err.endswith(
            "error: completion is for bash, zsh, fish and PowerShell\n"
        )


def test_a_home_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    home = tmp_path / "file"
    home.write_text("")
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(SystemExit) as ended:
        GROUP.main(["--install-completion"], prog_name="nanotron-fast")
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert str(home) in err


def test_bash_itself_completes(tmp_path: Path) -> None:
    """The script that is shown, in a bash, with the command as it is installed."""
    command = tmp_path / "nanotron-fast"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nanotron_fast "$@"\n')
    command.chmod(0o755)
    script = (
        'eval "$(nanotron-fast --show-completion)"\n'
        "COMP_WORDS=(nanotron-fast inspect --js) COMP_CWORD=2\n"
        '_nanotron_fast_completion nanotron-fast; echo "${COMPREPLY[@]}"\n'
        "complete -p nanotron-fast\n"
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "--json\ncomplete -o default -F _nanotron_fast_completion nanotron-fast\n"
    )
