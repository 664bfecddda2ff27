"""The script for Slurm, with a Slurm that is two processes of this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "slurm" / "train.sbatch"
# What Slurm would give each task, the second of which is on another node.
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=1 SLURM_LOCALID=0 "$@" >&2 &
wait -n && wait -n
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) printf '%s\\n' node7 node8 ;;
  requeue) echo "$2" > requeued ;;
esac
"""
TRAIN = """#!/usr/bin/env bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS: $*" > "rank-$RANK"
[[ $RANK != 0 ]] || echo "$SAYS"
exit "$CODE"
"""


@pytest.mark.parametrize(
    ("says", "code", "is_requeued"),
    [
        ("trained to step 20; run/20 is its checkpoint", 0, False),
        ("stopped by SIGUSR1 after step 12; run/12 is its checkpoint", 0, True),
        ("stopped by SIGTERM after step 12; run/12 is its checkpoint", 0, False),
        ("", 2, False),
    ],
)
def test_each_task_is_a_rank_and_a_run_that_is_not_done_is_queued_again(
    says: str, code: int, is_requeued: bool, tmp_path: Path
) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("nanotron-fast", TRAIN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), "train.yaml", "--general.run=a b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NTASKS": "2",
            "SLURM_CPUS_PER_TASK": "8",
            "SAYS": says,
            "CODE": str(code),
        },
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == (f"{says}\n" if code == 0 else "")
    assert (tmp_path / "requeued").exists() is is_requeued
    for rank in (0, 1):
        expected = f"{rank} 0 2 node7 24567 1: train train.yaml --general.run=a b\n"
        assert (tmp_path / f"rank-{rank}").read_text() == expected
