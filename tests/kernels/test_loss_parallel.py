"""Cross entropy, linear cross entropy and embedding over real ranks against the unsharded op.

`loss_ranks` holds the cases. Its processes start once; the tests look up what came of each.
"""

from __future__ import annotations

import json

import pytest

from tests import forks
from tests.kernels.checks import RUNS_ON_CPU
from tests.kernels.loss_ranks import NUM_RANKS, RUNS


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each rank the runs that failed, with their tracebacks."""
    folder = tmp_path_factory.mktemp("ranks")
    environments = [{"RANK": str(rank)} for rank in range(NUM_RANKS)]
    results = forks.run(["-m", "tests.kernels.loss_ranks", folder], environments, folder, 300)
    assert not any(each.code for each in results), "\n".join(each.err for each in results)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_like_the_unsharded_op(failures: list[dict[str, str]], name: str) -> None:
    if RUNS[name][0] == "triton" and not RUNS_ON_CPU:
        pytest.skip("the ranks have CPU tensors, and no kernels run there")
    for rank, failed in enumerate(failures):
        assert name not in failed, f"rank {rank}\n{failed[name]}"
