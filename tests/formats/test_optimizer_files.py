"""Names of the files of an optimizer's states, and what they say of the ranks that wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.nanotron.optimizer import (
    Described,
    Place,
    Sizes,
    config_document,
    find_states,
    lr_scheduler_path,
    optimizer_path,
    runs_of,
)


def write(folder: Path, sizes: Sizes, **parallelism: Any) -> Path:
    """Empty files of these names, and what goes with them."""
    for paths in (
        [optimizer_path(place, sizes) for place in sizes.places()],
        [lr_scheduler_path(place, sizes) for place in sizes.rate_places()],
    ):
        for path in paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
    config = config_document([], sizes)
    config["parallelism"].update(parallelism)
    (folder / "optimizer" / "optimizer_config.json").write_text(json.dumps(config))
    metadata = {"tp": sizes.tp, "dp": sizes.dp}
    (folder / "checkpoint_metadata.json").write_text(json.dumps(metadata))
    return folder


def names(folder: Path, what: str) -> list[str]:
    return sorted(path.name for path in (folder / what).glob("*.pt"))


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(2, 1, 1),
        Sizes(1, 2, 3, zero_stage=1),
        Sizes(1, 1, 4, ep=2),
        Sizes(2, 2, 4, zero_stage=1, ep=2),
        Sizes(1, 1, 4, zero_stage=1, ep=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_described", [True, False])
def test_what_is_written_is_found(tmp_path: Path, sizes: Sizes, is_described: bool) -> None:
    write(tmp_path, sizes)
    if not is_described:
        (tmp_path / "optimizer" / "optimizer_config.json").unlink()
    found = find_states(tmp_path)
    assert found.sizes == sizes
    assert set(found.files) == set(sizes.places())
    assert set(found.rates) == set(sizes.rate_places())
    for place, path in found.files.items():
        assert path == tmp_path / optimizer_path(place, sizes)


def test_names_of_experts_that_are_split(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", Sizes(1, 1, 4, ep=2))
    assert names(plain, "optimizer") == [
        "optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-2.pt",
        "optimizer_pp-0-of-1_tp-0-of-1_exp-1-of-2.pt",
    ]
    zero = write(tmp_path / "zero", Sizes(1, 1, 4, zero_stage=1, ep=2))
    assert names(zero, "optimizer") == [
        "optimizer_pp-0-of-1_dp-0-of-4_tp-0-of-1_exp-0-of-2.pt",
        "optimizer_pp-0-of-1_dp-1-of-4_tp-0-of-1_exp-1-of-2.pt",
        "optimizer_pp-0-of-1_dp-2-of-4_tp-0-of-1_exp-0-of-2.pt",
        "optimizer_pp-0-of-1_dp-3-of-4_tp-0-of-1_exp-1-of-2.pt",
    ]
    rates = [f"lr_scheduler_pp-0-of-1_tp-0-of-1_exp-{ep}-of-2.pt" for ep in (0, 1)]
    assert names(plain, "lr_scheduler") == names(zero, "lr_scheduler") == rates


def test_runs_of_experts_that_are_split() -> None:
    sizes = Sizes(1, 1, 4, zero_stage=1, ep=2)
    assert sizes.runs(10, is_split=False) == runs_of(10, 4)
    assert sizes.runs(10, is_split=True) == [(0, 5), (0, 5), (5, 10), (5, 10)]
    assert Sizes(1, 1, 3, zero_stage=1).runs(10, is_split=True) == runs_of(10, 3)
    described = [Described("experts", tuple(sizes.runs(3, is_split=True)), (3,))]
    config = config_document(described, sizes)
    assert config["parallelism"]["expert_parallel_size"] == "2"
    offsets = config["configs"]["param_name_to_dp_rank_offsets"]["experts"]
    assert offsets == {"0": ["0", "2"], "1": ["0", "2"], "2": ["2", "3"], "3": ["2", "3"]}


def refused(folder: Path, *said: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        find_states(folder)
    for words in said:
        assert words in str(raised.value)


def test_files_of_two_numbers_of_expert_ranks(tmp_path: Path) -> None:
    write(tmp_path, Sizes(1, 1, 4, ep=2))
    other = tmp_path / optimizer_path(Place(0, 0, None), Sizes(1, 1, 4))
    other.touch()
    refused(tmp_path, "2 topologies are mixed", "tp=1 pp=1 ep=2", f"tp=1 pp=1 ({other.name})")


def test_a_file_of_an_expert_rank_is_missing(tmp_path: Path) -> None:
    sizes = Sizes(1, 1, 4, ep=4)
    write(tmp_path, sizes)
    (tmp_path / optimizer_path(Place(0, 0, None, 3), sizes)).unlink()
    refused(tmp_path, "3 files of tp=1 pp=1 ep=4, which has 4; some are missing")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "optimizer_pp-0-of-1_dp-1-of-4_tp-0-of-1_exp-0-of-2.pt",
            "the data-parallel rank 1 has the experts of rank 1 of 2, and the name speaks of rank "
            "0",
        ),
        ("optimizer_pp-0-of-1_tp-0-of-1_exp-2-of-2.pt", "there is no such rank among so many"),
    ],
)
def test_ranks_that_cannot_be(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / name).touch()
    refused(tmp_path, name, said)


def test_learning_rates_of_other_expert_ranks(tmp_path: Path) -> None:
    write(tmp_path, Sizes(1, 1, 4, ep=2))
    for path in (tmp_path / "lr_scheduler").glob("*.pt"):
        path.unlink()
    sizes = Sizes(1, 1, 4, ep=4)
    for place in sizes.rate_places():
        (tmp_path / lr_scheduler_path(place, sizes)).touch()
    refused(tmp_path, "its files are of tp=1 pp=1 ep=4", "of tp=1 pp=1 dp=4 ep=2")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("4", "it speaks of tp=1 pp=1 dp=4 ep=4 with zero_stage=0, and the files beside it are"),
        ("0", "dp=4 ep=0 is no number of ranks"),
        ("two", "each a number: type is "),
    ],
)
def test_a_configuration_of_other_expert_ranks(tmp_path: Path, told: str, said: str) -> None:
    refused(write(tmp_path, Sizes(1, 1, 4, ep=2), expert_parallel_size=told), said)


def test_a_configuration_that_does_not_speak_of_experts(tmp_path: Path) -> None:
    write(tmp_path, Sizes(1, 1, 2))
    path = tmp_path / "optimizer" / "optimizer_config.json"
    config = json.loads(path.read_text())
    del config["parallelism"]["expert_parallel_size"]
    path.write_text(json.dumps(config))
    assert find_states(tmp_path).sizes == Sizes(1, 1, 2)


def test_experts_are_split_inside_of_data_parallelism(tmp_path: Path) -> None:
    refused(write(tmp_path, Sizes(1, 1, 3, ep=2)), "ep=2 does not divide dp=3")
