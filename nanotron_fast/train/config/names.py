"""The name of a run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime


def run_name(pattern: str, now: datetime, environment: Mapping[str, str]) -> str:
    """`general.run` with the time for %date and Slurm's job, or "local", for %jobid.

    Every rank must be given the same `now`, or each has a name of its own.
    """
    name = pattern.replace("%date", now.strftime("%Y%m%d_%H%M%S"))
    return name.replace("%jobid", environment.get("SLURM_JOB_ID", "local"))
