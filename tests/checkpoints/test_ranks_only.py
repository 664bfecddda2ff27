"""What some ranks need alone: for machines with disks of their own."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.reshard import reshard
from nanotron_fast.cli.reporting import inspection_lines
from nanotron_fast.errors import ConfigError, PartialCheckpointError, TopologyError
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


@pytest.mark.parametrize(
    ("ranks", "there", "missing"),
    [
        ("tp=0", {"pp": None, "tp": [0]}, "attn/o_proj/.*_pp-rank-0-of-2_tp-rank-1-of-4.safetens"),
        ("pp=1", {"pp": [1], "tp": None}, "model.token_position_embeddings.*weight is missing"),
        (["pp=0", "tp=1-3"], {"pp": [0], "tp": [1, 2, 3]}, "tp-rank-0-of-4.safetensors is missing"),
    ],
)
def test_a_part_is_told_and_refused(
    ranks: str | list[str], there: dict[str, list[int] | None], missing: str, tmp_path: Path
) -> None:
    source, out = make("llama", num_hidden_layers=2).save(tmp_path / "source"), tmp_path / "out"
    nf.convert(source, out, topology=AT, ranks_only=ranks)
    found = nf.inspect(out)
    assert found.problem is None
    assert found.warnings == ()
    assert found.topology == AT
    assert found.to_json()["ranks_there"] == there
    wanted = nf.inspect(source).spec
    assert found.spec == wanted
    said = f"files of ranks {Ranks.parse('', ranks)} of TP=4 PP=2 are there alone, as --ranks-only"
    assert any(said.removesuffix(", as --ranks-only") in each for each in inspection_lines(found))
    for call in (
        lambda: nf.convert(out, tmp_path / "back"),
        lambda: nf.verify(out, source),
        lambda: nf.verify(source, out),
        lambda: reshard(out, tmp_path / "back", tp=1),
    ):
        with pytest.raises(PartialCheckpointError, match=f"{said}.*{missing}"):
            call()
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_fewer_files_than_layers(tmp_path: Path) -> None:
    source, out = make("llama", num_hidden_layers=12).save(tmp_path / "source"), tmp_path / "out"
    nf.convert(source, out, topology=nf.Topology(pp=13), ranks_only="pp=1")
    assert nf.inspect(out).to_json()["ranks_there"] == {"pp": [1], "tp": None}
    with pytest.raises(PartialCheckpointError, match=r"pp=1 of .*files of 12 layers are wanted"):
        nf.convert(out, tmp_path / "back")


def test_a_whole_one_is_of_all_ranks(tmp_path: Path) -> None:
    """The last stage of a tied model has no file that is split."""
    source = make("llama", num_hidden_layers=2, tie_word_embeddings=True).save(tmp_path / "source")
    nf.convert(source, tmp_path / "out", topology=AT)
    found = nf.inspect(tmp_path / "out")
    assert found.ranks_there is None
    assert found.warnings == ()


def test_a_lost_parameter_is_told(tmp_path: Path) -> None:
    source, out = make("llama", num_hidden_layers=2).save(tmp_path / "source"), tmp_path / "out"
    nf.convert(source, out, topology=nf.Topology(tp=2))
    shutil.rmtree(out / "model" / "model" / "decoder" / "1" / "pp_block" / "mlp" / "down_proj")
    found = nf.inspect(out)
    assert found.ranks_there is None
    assert found.warnings == (
        "1 parameters that model_config.json calls for are missing: "
        "model.decoder.1.pp_block.mlp.down_proj.weight",
    )


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
