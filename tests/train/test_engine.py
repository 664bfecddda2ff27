"""Training on ranks: what is trained is the same, however it is spread."""

from __future__ import annotations

import pytest

from tests.parallel.ranks import run_ranks
from tests.train.engine import Case, check_against_plain


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
