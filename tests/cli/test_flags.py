"""The flags of the commands are made from the fields of `Options`, each once."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from nanotron_fast.checkpoints.options import Choices, Options, described
from nanotron_fast.cli.commands import app
from nanotron_fast.cli.flags import flags, gather
from nanotron_fast.cli.scripts import convert_hf_to_nanotron, convert_nanotron_to_hf
from nanotron_fast.errors import TopologyError
from nanotron_fast.model.topology import Topology

# Every flag of an option: its type, its default, the name of its value where that is no type.
FLAGS: dict[str, tuple[type, Any, str | None]] = {
    "to": (str, None, "FORMAT"),
    "tp": (int, 1, None),
    "pp": (int, 1, None),
    "ep": (int, 1, None),
    "dtype": (str, "keep", "DTYPE"),
    "model_class": (str, "auto", "CLASS"),
    "family": (str, None, "NAME"),
    "target": (str, None, "NAME"),
    "rope_interleaved": (bool, None, None),
    "checkpoint_version": (str, None, "VERSION"),
    "pad_vocab_to_multiple_of": (int, None, None),
    "vocab_size": (int, None, None),
    "max_shard_size": (str, None, "SIZE"),
    "names": (str, "hf", "WHOSE"),
    "master_weights": (bool, None, None),
    "tokenizer": (str, None, "DIR_OR_ID"),
    "like": (str, None, "DIR_OR_ID"),
    "ranks_only": (list, None, "AXIS=RANKS"),
    "ignore_tensors": (list, None, "GLOB"),
}
OWN = {
    "convert": [
        *("src", "dst", *FLAGS, "workers", "fsync", "overwrite", "resume", "overwrite_partial"),
        *("share", "finish", "io", "manifest", "dry_run", "json", "quiet"),
    ],
    "verify": [
        "a",
        "b",
        "logits",
        "family",
        "rope_interleaved",
        "like",
        "ignore_tensors",
        "workers",
        "json",
        "quiet",
    ],
    "inspect": ["path", "family", "rope_interleaved", "like", "json", "quiet"],
}


def commands() -> dict[str, Any]:
    group: Any = get_command(app)
    return dict(group.commands)


def test_each_option_is_a_flag_of_its_type() -> None:
    assert {each.name: (each.kind, each.default, each.metavar) for each in flags(Choices)} == FLAGS
    parts = {part for option in described().values() for part in option.parts}
    assert parts == {"tp", "pp", "ep"}
    assert set(FLAGS) - parts == {field.name for field in fields(Options)} - {"topology"}


@pytest.mark.parametrize("name", OWN)
def test_each_flag_is_there_once(name: str) -> None:
    command = commands()[name]
    assert [parameter.name for parameter in command.params] == OWN[name]
    spelled = Counter(word for each in command.params for word in each.opts)
    helps = {flag.name: flag.help for flag in flags(Choices)}
    for parameter in command.params:
        if parameter.name in FLAGS:
            kind, default, metavar = FLAGS[parameter.name]
            word = f"--{parameter.name.replace('_', '-')}"
            assert parameter.opts == [word]
            assert spelled[word] == 1
            assert parameter.help == helps[parameter.name]
            assert (parameter.default, parameter.metavar) == (default, metavar)
            assert parameter.multiple == (kind is list)
            negated = word.replace("--", "--no-", 1)
            assert parameter.secondary_opts == ([negated] if kind is bool else [])


def test_what_is_given_makes_the_options() -> None:
    given = {
        "src": "a",
        "tp": 2,
        "pp": 3,
        "ep": 2,
        "dtype": "bf16",
        "ignore_tensors": ["x"],
        "family": None,
    }
    choices = gather(Choices, given)
    assert choices == {
        "topology": Topology(tp=2, pp=3, ep=2),
        "dtype": "bf16",
        "ignore_tensors": ["x"],
        "family": None,
    }
    assert given == {"src": "a"}
    with pytest.raises(TopologyError, match="tp=0: a group has at least one rank"):
        gather(Choices, {"tp": 0, "pp": 1, "ep": 1})


@pytest.mark.parametrize(
    ("script", "spellings"),
    [
        (
            convert_hf_to_nanotron,
            {
                "tp": "--tp TP",
                "pp": "--pp PP",
                "tokenizer": "--tokenizer_name DIR_OR_ID",
                "ignore_tensors": "--ignore_tensors GLOB",
            },
        ),
        (
            convert_nanotron_to_hf,
            {
                "tokenizer": "--tokenizer_name DIR_OR_ID",
                "like": "--like DIR_OR_ID",
                "rope_interleaved": "--rope-interleaved, --no-rope-interleaved",
                "ignore_tensors": "--ignore_tensors GLOB",
            },
        ),
    ],
)
def test_the_scripts_say_the_same_of_them(
    script: ModuleType,
    spellings: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        script.main()
    shown = capsys.readouterr().out
    for flag in flags(Choices):
        assert (flag.help in shown) == (flag.name in spellings)
    for spelling in spellings.values():
        assert shown.count(f"\n  {spelling}") == 1
