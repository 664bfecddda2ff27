"""A rank of test_engine.py: runs of every kind that so many ranks can have, against one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from tests.parallel.ranks import join, run_cases
from tests.train.engine import Case, check_against_plain
from tests.train.experts import check_experts
from tests.train.resuming import check_resume, check_there_and_back

# Every combination of few ranks, and of many those in which more things meet.
CASES = {
    2: (
        Case(tp=2, has_documents=True),
        Case(tp=2, mode="reduce_scatter", is_tied=True, recompute="layer"),
        Case(pp=2, schedule="afab", is_tied=True),
        Case(pp=2, schedule="1f1b"),
        Case(pp=2, schedule="interleaved", chunks=2, has_documents=True),
        Case(dp=2, recompute="layer"),
        Case(dp=2, zero=1),
        Case(dp=2, zero=3, is_tied=True, recompute="layer"),
        Case(tp=2, mode="reduce_scatter", is_muon=True),
        Case(dp=2, is_muon=True),
        Case(dp=2, zero=1, is_muon=True),
    ),
    4: (
        Case(tp=2, pp=2, schedule="1f1b", mode="reduce_scatter", is_tied=True),
        Case(tp=2, dp=2, mode="reduce_scatter", zero=1),
        Case(pp=2, dp=2, schedule="interleaved", chunks=2, zero=1),
        Case(pp=2, dp=2, schedule="interleaved", chunks=2, zero=3),
        Case(pp=2, dp=2, schedule="1f1b", zero=3, is_tied=True),
        Case(tp=2, pp=2, schedule="1f1b", is_muon=True),
        # More tensor-parallel ranks than key-value heads.
        Case(tp=4, vocab=72, is_muon=True),
        Case(tp=4, vocab=72, mode="reduce_scatter", kv_heads=1),
        Case(tp=2, dp=2, vocab=72, zero=1, kv_heads=1),
        Case(tp=2, dp=2, vocab=72, mode="reduce_scatter", zero=3, kv_heads=1),
    ),
    8: (
        Case(tp=2, pp=2, dp=2, schedule="1f1b", mode="reduce_scatter", zero=1, is_tied=True),
        Case(tp=2, pp=2, dp=2, schedule="1f1b", zero=1, is_muon=True),
    ),
}
# What is saved, and where it is gone on with.
RESUMED = {
    2: (
        (Case(tp=2, is_tied=True), [Case(pp=2, schedule="interleaved", chunks=2)]),
        (Case(dp=2, zero=1, dtype=torch.bfloat16), [Case(tp=2), Case(dp=2, zero=3)]),
        (Case(dp=2, zero=3, dtype=torch.bfloat16), []),
    ),
    4: (
        (
            Case(tp=2, dp=2, zero=3, mode="reduce_scatter"),
            [Case(pp=2, dp=2, zero=1), Case(tp=2, dp=2, zero=1), Case(tp=2, pp=2)],
        ),
        (
            Case(tp=2, dp=2, zero=1, is_muon=True),
            [Case(tp=2, pp=2), Case(tp=2, dp=2, zero=3)],
        ),
        (Case(tp=2, dp=2, vocab=72, zero=1, kv_heads=1), [Case(tp=4)]),
    ),
    8: (),
}


def cases(size: int) -> Iterator[tuple[str, Callable[[], None]]]:
    for case in CASES[size]:
        yield str(case), partial(check_against_plain, case)
    if size == 2:
        yield "experts", check_experts
    for number, (case, others) in enumerate(RESUMED[size]):
        root = Path(os.environ["RANKS_STORE"]).with_name(f"saved-{number}")
        yield f"resume {case}", partial(check_resume, case, others, root)
        if case.tp > case.kv_heads:
            yield f"there and back {case}", partial(check_there_and_back, case, root)


if __name__ == "__main__":
    torch.set_num_threads(1)
    join()
    run_cases(cases(int(os.environ["WORLD_SIZE"])))
