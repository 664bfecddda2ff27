"""What some ranks need alone: for machines with disks of their own."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

import nanotron_fast as nf
from nanotron_fast.errors import ConfigError, NanotronFastError, TopologyError
from nanotron_fast.model.ranks import Ranks
from tests.checkpoints.kill_loop import tree
from tests.modelzoo import make

AT = nf.Topology(tp=4, pp=2)


@pytest.mark.parametrize("is_resharded", [False, True])
def test_the_parts_make_the_whole(is_resharded: bool, tmp_path: Path) -> None:
    source = make("llama", num_hidden_layers=2).save(tmp_path / "source")
    if is_resharded:
        nf.convert(source, tmp_path / "first", topology=nf.Topology(tp=2))
        source = tmp_path / "first"
    whole, joined = tmp_path / "whole", tmp_path / "joined"
    nf.convert(source, whole, topology=AT, to="nanotron")
    for stage in range(2):
        for ranks in ("tp=0-1", "tp=2,3"):
            part = tmp_path / f"{stage}{ranks}"
            choice = [f"pp={stage}", ranks]
            nf.convert(source, part, topology=AT, to="nanotron", ranks_only=choice)
            for path in part.rglob("*_tp-rank-*.safetensors"):
                found = re.search(r"pp-rank-(\d)-of-2_tp-rank-(\d)-of-4", path.name)
                assert found is not None
                assert int(found[1]) == stage
                assert (int(found[2]) < 2) == (ranks == "tp=0-1")
            shutil.copytree(part, joined, dirs_exist_ok=True)
    assert tree(joined) == tree(whole)
    assert nf.verify(source, joined).equal


def test_what_is_not_whole_is_not_taken_for_it(tmp_path: Path) -> None:
    source = make("llama", num_hidden_layers=2).save(tmp_path / "source")
    report = nf.convert(source, tmp_path / "out", topology=AT, ranks_only="tp=0")
    assert any(
        "ranks tp=0 of TP=4 PP=2 need is written alone" in each for each in report.plan.warnings
    )
    with pytest.raises(NanotronFastError, match="are missing"):
        nf.convert(tmp_path / "out", tmp_path / "back")
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ("pp=1", Ranks(pp=frozenset({1}))),
        ("tp=0-3", Ranks(tp=frozenset(range(4)))),
        ("pp=0,2,tp=1-2,5", Ranks(frozenset({0, 2}), frozenset({1, 2, 5}))),
        (["pp=1", "tp=0", "tp=3"], Ranks(frozenset({1}), frozenset({0, 3}))),
    ],
)
def test_ranks_are_spelled(given: str | list[str], ranks: Ranks) -> None:
    assert Ranks.parse("--ranks-only", given) == ranks


@pytest.mark.parametrize(
    "given", ["", "pp", "dp=1", "pp=", "pp=a", "pp=3-1", "pp=-1", "1", "tp=1-", f"tp=0-{10**9}"]
)
def test_ranks_that_are_none(given: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--ranks-only {given}: write it as pp=1 or")):
        Ranks.parse("--ranks-only", given)


def test_ranks_beyond_the_topology(tmp_path: Path) -> None:
    source = make("llama", num_hidden_layers=2).save(tmp_path / "source")
    message = "tp=4: there is no such rank at TP=4 PP=2; they count from 0 to 3"
    with pytest.raises(TopologyError, match=message):
        nf.convert(source, tmp_path / "out", topology=AT, ranks_only=["tp=0-4"])
    assert sorted(os.listdir(tmp_path)) == ["source"]
