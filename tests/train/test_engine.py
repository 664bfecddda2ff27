"""Training on ranks: what is trained is the same, however it is spread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.ranks import run_ranks
from tests.train.engine import Case, check_against_plain
from tests.train.resuming import check_folder, check_resume


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_agree_with_one_process_and_plain_torch(size: int) -> None:
    run_ranks("tests.train.engine_ranks", size)


@pytest.mark.parametrize(
    "case",
    [Case(), Case(is_tied=True, recompute="layer"), Case(has_documents=True)],
    ids=["alone", "tied", "documents"],
)
def test_one_process_agrees_with_plain_torch(case: Case) -> None:
    check_against_plain(case)


def test_a_run_of_one_process_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    check_resume(Case(is_tied=True), [Case()], tmp_path)
    check_folder(tmp_path / "first")


def test_a_bf16_run_keeps_its_masters(tmp_path: Path) -> None:
    check_resume(Case(dtype=torch.bfloat16), [], tmp_path)
