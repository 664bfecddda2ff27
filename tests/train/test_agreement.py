"""Which values all ranks of a run must have alike, and which may be a machine's own."""

from __future__ import annotations

from typing import Any

import pytest

from nanotron_fast.errors import ConfigError, MissingPackageError
from nanotron_fast.train.config import agreement
from nanotron_fast.train.config.agreement import (
    check_agreement,
    check_packages,
    packages,
    what_ranks_share,
)
from tests.train.configs import read

Changes = dict[str, Any]


def on_disk(**changes: Any) -> Changes:
    dataset = {"dataset_folder": ["/a", "/b"], "vocab_size": 512, "token_size_in_bytes": 2}
    return {"data_stages__0__data__dataset": {**dataset, **changes}}


def text(places: Any, **changes: Any) -> Changes:
    dataset = {"hf_dataset_or_datasets": places, **changes}
    return {"data_stages__0__data__dataset": dataset, "tokenizer__tokenizer_name_or_path": "/t"}


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (on_disk(), on_disk(dataset_folder=["/c", "/d"])),
        (on_disk(), on_disk(dataset_read_path=["/ram/a", "/ram/b"])),
        (text("/a.txt"), text(["/b.txt"])),
        (text({"/a.txt": 1.0, "/b.txt": 2.0}), text({"/c.txt": 1.0, "/d.txt": 2.0})),
        (text("/a.txt"), text("/a.txt", dataset_processing_num_proc_per_process=8)),
        ({"tokenizer__tokenizer_name_or_path": "/t"}, {}),
        ({"model__init_method": {"path": "/a"}}, {"model__init_method": {"path": "/b"}}),
        ({"checkpoints__resume_checkpoint_path": "/a"}, {}),
        ({"logging__log_level": "error"}, {}),
        ({"general__run": "%date"}, {"general__run": "%date"}),
    ],
)
def test_what_may_be_a_machines_own(first: Changes, other: Changes) -> None:
    check_agreement(read(**other), what_ranks_share(read(**first)))


@pytest.mark.parametrize(
    ("first", "other", "told"),
    [
        ({}, {"checkpoints__keep_last": 1}, "checkpoints.keep_last is 1 on one rank, and null on"),
        ({}, {"optimizer__zero_stage": 3}, "optimizer.zero_stage is 3 on one rank, and 0 on the"),
        (on_disk(), on_disk(dataset_weights=[1, 2]), "dataset_weights.0 is 1.* rank, and null on"),
        (on_disk(), on_disk(return_positions=False), "return_positions is false on one rank"),
        (on_disk(), on_disk(dataset_folder=["/a"]), "dataset_folder.1 is null .* and 'a path' on"),
        (on_disk(), {}, "dataset.dataset_folder.0 is null on one rank"),
        (text("/a.txt"), text("/a.txt", text_column_name="x"), "text_column_name is 'x' on one"),
        (
            text({"/a.txt": 1.0, "/b.txt": 2.0}),
            text({"/a.txt": 1.0, "/b.txt": 3.0}),
            "hf_dataset_or_datasets.1 is 3.0 on one rank, and 2.0 on the first",
        ),
    ],
)
def test_what_must_be_alike(first: Changes, other: Changes, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_agreement(read(**other), what_ranks_share(read(**first)))


def test_packages_must_be_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    first = packages()
    check_packages(first)
    with pytest.raises(MissingPackageError, match=r"^torch is 2.* on one rank, and 1\.0 on"):
        check_packages({**first, "torch": "1.0"})
    monkeypatch.setattr(agreement, "_PACKAGES", ("torch", "triton", "not-there"))
    check_packages(first)
    with pytest.raises(MissingPackageError, match=r"^not-there is missing on one rank, and 2\.0"):
        check_packages({**first, "not-there": "2.0"})


def test_a_stage_goes_by_its_name() -> None:
    """Their order in the document need not be that of their steps."""

    def staged(seed: int) -> Changes:
        steps = {"late": 3, "early": 1}
        data = {"dataset": None, "seed": seed, "num_loading_workers": 1}
        return {
            "data_stages": [
                {"name": name, "start_training_step": step, "data": data}
                for name, step in steps.items()
            ]
        }

    with pytest.raises(
        ConfigError, match=r"data_stages\.early\.data\.seed is 1 on one rank, and 2"
    ):
        check_agreement(read(**staged(1)), what_ranks_share(read(**staged(2))))
