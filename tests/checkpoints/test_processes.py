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
from tests import forks

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
    results = run_ranks(
        2, "-m", "nanotron_fast", "convert", golden_hf, tmp_path / "out", "--tp", 2, "--json"
    )
    report = json.loads(results[0].out)
    assert results[1].out == ""
    assert report["tensor_files"] == len(list((tmp_path / "out").rglob("*.safetensors")))
    assert nf.verify(golden_hf, tmp_path / "out").equal


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


@pytest.mark.parametrize("world_size", ["many", "2"])
def test_a_world_that_cannot_be_connected(world_size: str, tmp_path: Path, golden_hf: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    words = ["-m", "nanotron_fast", "convert", str(golden_hf), str(tmp_path / "out")]
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
