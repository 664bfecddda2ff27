"""Several processes that share one conversion, as under torchrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.cut_files import cut_in
from nanotron_fast.checkpoints.reshard import reshard
from tests import forks
from tests.checkpoints.kill_loop import tree
from tests.modelzoo import make
from tests.plans import small_cuts

SCRIPTS = Path(__file__).parents[2] / "examples" / "llama"
RunRanks = Callable[..., list[forks.Result]]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ranks(world_size: int) -> list[dict[str, str]]:
    """What torchrun says to each process."""
    port = str(free_port())
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(world_size)
    ]


@pytest.fixture
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> RunRanks:
    """What torchrun does, without its launcher: ranks with the same words, torch imported."""

    def run(world_size: int, *words: object, code: int = 0) -> list[forks.Result]:
        results = forks.run(words, ranks(world_size), tmp_path_factory.mktemp("streams"), 120)
        for result in results:
            assert result.code == code, result.err
        return results

    return run


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_scripts_of_nanotron_there_and_back(
    run_ranks: RunRanks, world_size: int, tmp_path: Path, golden_hf: Path, golden: Path
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    results = run_ranks(
        world_size,
        SCRIPTS / "convert_hf_to_nanotron.py",
        f"--checkpoint_path={golden_hf}",
        f"--save_path={there}",
    )
    assert f"Model saved to {there}" in results[0].out
    assert all(result.out == "" for result in results[1:])
    assert nf.verify(golden_hf, there).equal
    run_ranks(
        world_size,
        SCRIPTS / "convert_nanotron_to_hf.py",
        f"--checkpoint_path={there}",
        f"--save_path={back}",
        f"--tokenizer_name={golden / 'qwen2' / 'hf'}",
        "--config_cls=Qwen2Config",
    )
    assert nf.verify(golden_hf, back).equal
    tokenizer = (golden / "qwen2" / "hf" / "tokenizer.json").read_bytes()
    assert (back / "tokenizer.json").read_bytes() == tokenizer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]


def test_every_process_writes_its_share(
    run_ranks: RunRanks, tmp_path: Path, golden_hf: Path
) -> None:
    words = ("convert", golden_hf, tmp_path / "out", "--tp", 2, "--manifest", "--json")
    results = run_ranks(2, "-m", "nanotron_fast", *words)
    report = json.loads(results[0].out)
    assert results[1].out == ""
    assert report["tensor_files"] == len(list((tmp_path / "out").rglob("*.safetensors")))
    assert nf.verify(golden_hf, tmp_path / "out").equal
    found = nf.check_manifest(tmp_path / "out")
    assert found.intact
    assert found.files_checked == report["tensor_files"]


def test_a_training_is_resharded_by_several(
    run_ranks: RunRanks, tmp_path: Path, golden: Path
) -> None:
    source = golden / "training" / "llama_tied_tp2_zero0"
    reshard(source, tmp_path / "one" / "2", tp=1, pp=2, dp=2, zero_stage=1, manifest=True)
    words = ("reshard", source, tmp_path / "two" / "2", "--tp", 1, "--pp", 2, "--dp", 2)
    results = run_ranks(2, "-m", "nanotron_fast", *words, "--zero-stage", 1, "--manifest", "--json")
    report = json.loads(results[0].out)
    assert results[1].out == ""
    assert report["states"] is not None
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert (tmp_path / "two" / "latest.txt").read_text() == "2"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["2", "latest.txt"]
    assert nf.check_manifest(tmp_path / "two" / "2").intact


def test_a_resharding_that_one_cannot_do_leaves_nothing(
    run_ranks: RunRanks, tmp_path: Path, golden: Path
) -> None:
    source = golden / "training" / "llama_tied_tp2_zero0"
    words = ("-m", "nanotron_fast", "reshard", source, tmp_path / "2", "--tp", 3)
    results = run_ranks(2, *words, code=2)
    assert "tp=3" in results[0].err.lower()
    assert list(tmp_path.iterdir()) == []


def test_one_failure_stops_all_and_leaves_nothing(
    run_ranks: RunRanks, tmp_path: Path, golden_hf: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    results = run_ranks(2, "-m", "nanotron_fast", "convert", golden_hf, out, code=2)
    assert "is not empty" in results[0].err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["precious"]


# A rank that is killed when some of its files are whole, or whose disk is full then.
ENDS = """
import errno, os, signal, sys
from nanotron_fast.moves import engine
execute = engine.execute
def end(plan, root, **given):
    part = plan.without({{each.path for each in plan.outputs[3:]}}) if {is_this} else plan
    execute(part, root, **given)
    if {is_this}:
        {what}
engine.execute = end
sys.argv = ["nanotron-fast", *sys.argv[1:]]
from nanotron_fast.__main__ import main
main()
"""
FAILS = 'raise OSError(errno.ENOSPC, "No space left on device", plan.outputs[3].path)'
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("what", ["fails", "is killed"])
def test_one_that_ends_leaves_what_others_go_on_with(
    rank: int, what: str, run_ranks: RunRanks, tmp_path: Path, golden_hf: Path
) -> None:
    """Fewer may go on, or more: the shares are cut anew."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    is_this = f'os.environ["RANK"] == "{rank}"'
    script.write_text(ENDS.format(is_this=is_this, what=FAILS if what == "fails" else KILLED))
    environments = ranks(3)
    streams = tmp_path / "streams"
    streams.mkdir()
    words = [script, "convert", golden_hf, out, "--tp", 2]
    results = forks.run(words, environments, streams, 120)
    for number, result in enumerate(results):
        expected = -9 if number == rank and what == "is killed" else 2
        assert result.code == expected, result.err
    assert not out.exists()
    if what == "fails":
        assert "No space left on device" in results[rank].err
        assert "--resume goes on with them" in results[0].err
    (result, _) = run_ranks(
        2, "-m", "nanotron_fast", "convert", golden_hf, out, "--tp", 2, "--resume"
    )
    assert "files of 45 were whole before" in result.out
    assert nf.verify(golden_hf, out).equal
    nf.convert(golden_hf, tmp_path / "wanted", topology=nf.Topology(tp=2))
    assert tree(out) == tree(tmp_path / "wanted")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["out", "script.py", "streams", "wanted"]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_processes_write_the_same_bytes(
    world_size: int, run_ranks: RunRanks, tmp_path: Path, golden_hf: Path
) -> None:
    words = ("-m", "nanotron_fast", "convert", golden_hf, tmp_path / "out", "--tp", 2, "--pp", 2)
    run_ranks(world_size, *words)
    nf.convert(golden_hf, tmp_path / "wanted", topology=nf.Topology(tp=2, pp=2))
    assert tree(tmp_path / "out") == tree(tmp_path / "wanted")


# Tiny files are cut, as large ones are; and where asked, a rank ends when it has written what it
# has to, or all of that but its parts of cut files, or must have none.
CUTS = """
import errno, os, sys
from nanotron_fast.moves import engine, shares
shares.CUT_MULTIPLE_BYTES, shares.CUT_OVER_BYTES = 4096, 0
execute = engine.execute
def end(plan, root, **given):
    if os.environ["ENDS"] == "never":
        assert not any(each.part for each in plan.outputs)
        return execute(plan, root, **given)
    assert any(each.part for each in plan.outputs)
    parts = {each.path for each in plan.outputs if each.part}
    execute(plan if os.environ["ENDS"] == "behind" else plan.without(parts), root, **given)
    raise OSError(errno.ENOSPC, "No space left on device", "x")
if os.environ.get("ENDS") and os.environ["RANK"] == "1":
    engine.execute = end
sys.argv = ["nanotron-fast", *sys.argv[1:]]
from nanotron_fast.__main__ import main
main()
"""


@pytest.fixture
def cutting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("script") / "cutting.py"
    script.write_text(CUTS)
    return script


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A model whose two largest tensors make uneven shares of whole files."""
    return make("llama", num_hidden_layers=1, vocab_size=1000).save(tmp_path / "source")


def num_cut(source: Path, world_size: int) -> int:
    """Files that so many processes cut."""
    with small_cuts(4096):
        transfer = nf.plan(source, source.with_name("any")).transfer
        return len(cut_in(transfer, transfer.deal(world_size, cuts=True)))


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "io"), [(3, "direct"), (7, "auto")])
def test_processes_that_write_parts_of_large_files(
    world_size: int, io: str, cutting: Path, run_ranks: RunRanks, uneven: Path, tmp_path: Path
) -> None:
    assert num_cut(uneven, world_size) == 2
    nf.convert(uneven, tmp_path / "wanted")
    run_ranks(world_size, cutting, "convert", uneven, tmp_path / "out", "--io", io, "--fsync")
    assert tree(tmp_path / "out") == tree(tmp_path / "wanted")


@pytest.mark.parametrize(
    ("world_size", "io"),
    [
        pytest.param(2, "buffered", marks=pytest.mark.slow),
        (3, "direct"),
        pytest.param(7, "auto", marks=pytest.mark.slow),
    ],
)
def test_processes_that_write_parts_of_the_only_file(
    world_size: int, io: str, cutting: Path, run_ranks: RunRanks, uneven: Path, tmp_path: Path
) -> None:
    nf.convert(uneven, tmp_path / "nanotron")
    nf.convert(tmp_path / "nanotron", tmp_path / "wanted")
    assert num_cut(tmp_path / "nanotron", world_size) == 1
    words = ("convert", tmp_path / "nanotron", tmp_path / "out", "--io", io)
    run_ranks(world_size, cutting, *words)
    assert tree(tmp_path / "out") == tree(tmp_path / "wanted")


@pytest.mark.parametrize("ends", ["before", pytest.param("behind", marks=pytest.mark.slow)])
def test_a_file_of_which_a_part_is_missing_is_written_again(
    ends: str, cutting: Path, run_ranks: RunRanks, uneven: Path, tmp_path: Path
) -> None:
    """Its other parts do not make it count; and all parts do, whoever wrote them."""
    environments = [{**each, "ENDS": ends} for each in ranks(3)]
    streams = tmp_path / "streams"
    streams.mkdir()
    results = forks.run([cutting, "convert", uneven, tmp_path / "out"], environments, streams, 120)
    assert [result.code for result in results] == [2, 2, 2]
    assert "No space left on device" in results[1].err
    with small_cuts(4096):
        transfer = nf.plan(uneven, tmp_path / "any").transfer
        dealt = transfer.deal(3, cuts=True)
        cut = {each.path for each in cut_in(transfer, dealt)}
        of_rank = {each.path for each in transfer.parts(dealt[1]).outputs if each.part is not None}
    num_whole = len(transfer.outputs) - (0 if ends == "behind" else len(of_rank))
    assert of_rank <= cut
    assert of_rank
    (partial,) = tmp_path.glob("out.partial-*")
    assert f"{num_whole} of 9 files are whole in {partial}" in results[0].err
    (result, *_) = run_ranks(4, cutting, "convert", uneven, tmp_path / "out", "--resume")
    assert f"{num_whole} files of 9 were whole before" in result.out
    nf.convert(uneven, tmp_path / "wanted")
    assert tree(tmp_path / "out") == tree(tmp_path / "wanted")
    assert not list(tmp_path.glob("out.partial-*"))


def test_a_manifest_keeps_files_whole(cutting: Path, uneven: Path, tmp_path: Path) -> None:
    """A tensor is hashed by whoever writes it, so one process does."""
    environments = [{**each, "ENDS": "never"} for each in ranks(3)]
    streams = tmp_path / "streams"
    streams.mkdir()
    words = [cutting, "convert", uneven, tmp_path / "out", "--manifest"]
    for result in forks.run(words, environments, streams, 120):
        assert result.code == 0, result.err
    assert nf.check_manifest(tmp_path / "out").intact


@pytest.mark.parametrize("command", ["convert", "train"])
@pytest.mark.parametrize("world_size", ["many", "2"])
def test_a_world_that_cannot_be_connected(
    world_size: str, command: str, tmp_path: Path, golden_hf: Path
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    words = ["-m", "nanotron_fast", command, str(golden_hf)]
    words += [str(tmp_path / "out")] if command == "convert" else []
    result = subprocess.run(
        [sys.executable, *words],
        env={**environment, "WORLD_SIZE": world_size},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: WORLD_SIZE is ")
    assert "Traceback" not in result.stderr


def test_a_script_with_a_bad_topology(run_ranks: RunRanks, tmp_path: Path, golden_hf: Path) -> None:
    (result,) = run_ranks(
        1,
        SCRIPTS / "convert_hf_to_nanotron.py",
        f"--checkpoint_path={golden_hf}",
        f"--save_path={tmp_path / 'out'}",
        "--tp=0",
        code=2,
    )
    assert result.err == "error: tp=0: a group has at least one rank\n"
