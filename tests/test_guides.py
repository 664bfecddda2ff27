"""What the documents show: configurations that are read, links to files, options that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from nanotron_fast.cli.commands import app
from nanotron_fast.train import TrainingConfig
from nanotron_fast.train.config.document import override
from tests.train.configs import document

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
GUIDES = [ROOT / "docs" / name for name in ("training.md", "continue-pretraining.md")]


def blocks(path: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_configurations_are_read_without_a_warning(path: Path) -> None:
    found = blocks(path, "yaml")
    assert found
    for text in found:
        # A part of one is laid over a whole one.
        given = {**document(), **yaml.safe_load(text)}
        assert TrainingConfig.from_dict(given, name=path.name).warnings == ()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_to_files(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / link).exists(), link


def commands() -> list[tuple[str, str]]:
    """Every line of a console block that starts a command of ours, by its document."""
    found = []
    for path in DOCUMENTS:
        for block in blocks(path, "console"):
            joined = block.replace("\\\n", " ")
            for line in re.findall(r"^\$ (.*)$(?!\nerror: )", joined, re.MULTILINE):
                given = re.search(r"(?:nanotron-fast|-m nanotron_fast) ([a-z].*)", line)
                if given is not None:
                    found.append((path.name, given[1].partition(" #")[0]))
    return found


def test_commands_have_the_options_that_they_are_shown_with() -> None:
    known: Any = get_command(app)
    shown = commands()
    assert len(shown) > 15
    for name, words in shown:
        command, *arguments = words.split()
        assert command in known.commands, (name, words)
        options = {
            option
            for each in known.commands[command].params
            for option in (*each.opts, *each.secondary_opts)
        }
        if command == "run":  # what follows is the script's
            continue
        for argument in arguments:
            key = argument.partition("=")[0]
            if key.startswith("--") and "." in key:
                assert command == "train", (name, words)
                changed = document()
                override(changed, [argument])
                TrainingConfig.from_dict(changed)
            elif key.startswith("-") and key != "-c":
                assert key in options, (name, words)
