"""Each option is one field of `Options`: the functions take it, and a direction may refuse it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.checkpoints.options import WAYS, Choices, Options, described
from nanotron_fast.errors import CheckpointError, ConfigError
from nanotron_fast.moves.dtypes import Dtype

ALL = [
    "to",
    "topology",
    "dtype",
    "model_class",
    "family",
    "target",
    "rope_interleaved",
    "checkpoint_version",
    "pad_vocab_to_multiple_of",
    "vocab_size",
    "max_shard_size",
    "names",
    "master_weights",
    "tokenizer",
    "like",
    "ranks_only",
    "ignore_tensors",
]
# What each function takes, in order.
TAKEN = {
    "convert": ALL,
    "plan": ALL,
    "verify": ["family", "rope_interleaved", "like", "ignore_tensors"],
    "inspect": ["family", "rope_interleaved", "like"],
    "load_into": [
        "model_class",
        "family",
        "target",
        "rope_interleaved",
        "checkpoint_version",
        "pad_vocab_to_multiple_of",
        "like",
        "ignore_tensors",
    ],
}
# What is given, by the flag that a message names.
GIVEN: dict[str, dict[str, Any]] = {
    "--to": {"to": "hf"},
    "--tp": {"topology": Topology(tp=2)},
    "--pp": {"topology": Topology(pp=2)},
    "--ep": {"topology": Topology(ep=2)},
    "--dtype": {"dtype": "bf16"},
    "--model-class": {"model_class": "qwen2"},
    "--family": {"family": "llama"},
    "--target": {"target": "nanotron-fast"},
    "--rope-interleaved": {"rope_interleaved": False},
    "--checkpoint-version": {"checkpoint_version": "1.2"},
    "--pad-vocab-to-multiple-of": {"pad_vocab_to_multiple_of": 8},
    "--vocab-size": {"vocab_size": 8},
    "--max-shard-size": {"max_shard_size": "5GB"},
    "--names": {"names": "torchtitan"},
    "--master-weights": {"master_weights": True},
    "--tokenizer": {"tokenizer": "/"},
    "--like": {"like": "/"},
    "--ranks-only": {"ranks_only": ["pp=0"]},
    "--ignore-tensors": {"ignore_tensors": ["a"]},
}
REFUSED = {
    "nanotron": ("--vocab-size", "--max-shard-size", "--names", "--master-weights"),
    "hf": (
        "--tp",
        "--pp",
        "--ep",
        "--model-class",
        "--pad-vocab-to-multiple-of",
        "--names",
        "--ranks-only",
    ),
    "dcp": ("--tp", "--pp", "--ep", "--model-class", "--pad-vocab-to-multiple-of", "--ranks-only"),
    "renaming": (
        "--tp",
        "--pp",
        "--ep",
        "--model-class",
        "--target",
        "--rope-interleaved",
        "--checkpoint-version",
        "--pad-vocab-to-multiple-of",
        "--vocab-size",
        "--master-weights",
        "--ranks-only",
    ),
    "resharding": (
        "--dtype",
        "--model-class",
        "--target",
        "--rope-interleaved",
        "--checkpoint-version",
        "--pad-vocab-to-multiple-of",
        "--vocab-size",
        "--max-shard-size",
        "--names",
        "--master-weights",
        "--like",
    ),
}
WORDS = {
    "nanotron": "writing a Nanotron checkpoint",
    "hf": "writing a Hugging Face checkpoint",
    "dcp": "writing a checkpoint of torch.distributed.checkpoint",
    "renaming": "no Nanotron checkpoint is read or written",
    "resharding": "writing a Nanotron checkpoint at another topology",
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_misspelt_keyword(name: str, golden_hf: Path) -> None:
    function: Callable[..., Any] = getattr(nf, name)
    with pytest.raises(TypeError, match=r"'famly'; did you mean family\? the keywords are") as told:
        function(golden_hf, famly="llama")
    listed = str(told.value).partition("the keywords are ")[2].split(", ")
    assert listed == [*inspect.signature(function).parameters]
    with pytest.raises(TypeError, match="'nonsense'; the keywords are"):
        function(golden_hf, nonsense=1)


def test_fields_and_keywords_are_the_same() -> None:
    assert [field.name for field in fields(Options)] == ALL
    assert set(Choices.__annotations__) == set(ALL)
    assert {name for given in GIVEN.values() for name in given} == set(ALL)


@pytest.mark.parametrize("name", TAKEN)
def test_a_function_shows_its_options(name: str) -> None:
    function: Callable[..., Any] = getattr(nf, name)
    parameters = inspect.signature(function).parameters
    assert [each for each in parameters if each in ALL and each != "topology"] == [
        each for each in TAKEN[name] if each != "topology"
    ]
    assert inspect.Parameter.VAR_KEYWORD not in {each.kind for each in parameters.values()}
    types = get_type_hints(function)
    text = " ".join((function.__doc__ or "").partition("\nOptions:")[2].split())
    for option in TAKEN[name]:
        parameter = parameters[option]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.annotation == types[option] == get_type_hints(Choices)[option]
        assert Options.of({option: parameter.default}) == Options()
        assert f" {option}: {described()[option].help} " in f" {text} "


@pytest.mark.parametrize("name", TAKEN)
def test_a_function_refuses_what_it_does_not_take(name: str, golden_hf: Path) -> None:
    places: dict[str, tuple[Any, ...]] = {
        "inspect": (golden_hf,),
        "load_into": ({}, golden_hf),
    }
    needed = {"topology": Topology(), "rank": 0} if name == "load_into" else {}
    function: Callable[..., Any] = getattr(nf, name)
    others = set(ALL) - set(TAKEN[name]) - set(needed)
    for other in (*others, "tp", "nonsense"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{other}'"):
            function(*places.get(name, (golden_hf, golden_hf)), **needed, **{other: None})


@pytest.mark.parametrize("flag", GIVEN)
@pytest.mark.parametrize("way", REFUSED)
def test_an_option_without_meaning_in_a_direction_is_refused(way: Any, flag: str) -> None:
    assert set(WAYS) == set(REFUSED)
    options = Options.of(GIVEN[flag])
    assert options != Options()
    if flag not in REFUSED[way]:
        options.reject_for(way)
        return
    with pytest.raises(ConfigError) as caught:
        options.reject_for(way)
    assert str(caught.value) == f"{flag}: it has no meaning when {WORDS[way]}"


def test_ways_are_known() -> None:
    for option in described().values():
        assert set(option.ways) <= set(WAYS)


def test_none_stands_for_the_default() -> None:
    assert Options.of(dict.fromkeys(ALL)) == Options()
    for way in WAYS:
        Options().reject_for(way)


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ({"dtype": "float16"}, {"dtype": Dtype.F16}),
        ({"max_shard_size": " 1.5 gb"}, {"max_shard_size": 1_500_000_000}),
        ({"max_shard_size": 7}, {"max_shard_size": 7}),
        ({"ignore_tensors": "v_head.*"}, {"ignore_tensors": ("v_head.*",)}),
        ({"ignore_tensors": ["a", "b"]}, {"ignore_tensors": ("a", "b")}),
        ({"like": "/"}, {"like": Path("/")}),
    ],
)
def test_what_is_given_is_checked(given: dict[str, Any], held: dict[str, Any]) -> None:
    assert Options.of(given) == Options(**held)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"topology": (2, 1)}, ConfigError, r"topology is \(2, 1\), a tuple: give "),
        ({"target": "megatron"}, ConfigError, "--target megatron: choose nanotron or nanotron-f"),
        ({"checkpoint_version": "1.4"}, ConfigError, "--checkpoint-version 1.4: choose 1.5 or"),
        ({"vocab_size": 2**32}, ConfigError, "--vocab-size 4294967296: it should be at most"),
        ({"tokenizer": "/no/such/place"}, CheckpointError, "/no/such/place: no such directory"),
    ],
)
def test_what_cannot_be_is_refused(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Options.of(given)


def test_values_are_checked_where_a_direction_does_not_look_at_them(
    tmp_path: Path, golden_hf: Path
) -> None:
    nf.convert(golden_hf, tmp_path / "there")
    with pytest.raises(ConfigError, match="--target megatron: choose"):
        nf.plan(tmp_path / "there", tmp_path / "new", to="nanotron", target="megatron")
    with pytest.raises(ConfigError, match=r"--checkpoint-version 1\.4: choose"):
        nf.load_into({}, tmp_path / "there", topology=Topology(), rank=0, checkpoint_version="1.4")
    with pytest.raises(ConfigError, match="--family gpt: choose one of"):
        nf.verify(golden_hf, tmp_path / "there", family="gpt")
