"""Kills conversions at random moments, and goes on with what they leave: a program of its own.

Processes are forked from one that has imported everything, so that a kill costs milliseconds. After
each, the destination must be as it was, or whole, or without the mark of a whole checkpoint; some
are made by several processes, one of which is killed, and which write parts of one file. In the end
it must hold the same bytes as after a run that nobody killed, and nothing may lie beside it.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nanotron_fast
from nanotron_fast import interruption
from tests.checkpoints.linked import Linked, pairs_for
from tests.plans import small_cuts

MARK = "checkpoint_metadata.json"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def tree(folder: Path) -> dict[str, str]:
    """A digest of every file, by its path.

    Left out are this tool's for the time being, and config.yaml, which says where it lies.
    """
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != "config.yaml"
        and ".nanotron_fast." not in str(path.relative_to(folder))
    }


def forked(work: Callable[[], object]) -> int:
    """Runs work in a process of its own, and returns its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            interruption.install()
            work()
            code = 0
        except interruption.Interrupted as interrupted:
            code = interrupted.exit_code
        finally:
            os._exit(code)
    return child


def check(out: Path, allowed: list[dict[str, str]]) -> None:
    """Raises AssertionError where the destination looks whole and is not."""
    found = tree(out)
    if found in allowed:
        return
    assert MARK not in found, f"{out} looks whole, and is not"


def started(work: Callable[..., object], world_size: int) -> list[int]:
    """Runs work in so many processes that share it, and returns their numbers."""
    if world_size == 1:
        return [forked(work)]
    pairs = pairs_for(world_size)
    children = [
        forked(lambda rank=rank: work(processes=Linked(rank, pairs)))  # type: ignore[misc]
        for rank in range(world_size)
    ]
    for pair in pairs:
        for link in pair:
            link.close()
    return children


def one_round(
    source: Path,
    root: Path,
    kind: str,
    wanted: dict[str, str],
    old: Path,
    kills: int,
    seconds: float,
) -> int:
    """Kills a conversion so many times, then lets it end. Returns how often it ended by itself."""
    root.mkdir()
    out = root / "out"
    before: dict[str, str] = {}
    if kind == "within":
        out.mkdir()
    if kind == "over another":
        shutil.copytree(old, out)
        before = tree(out)
    is_shared = kind == "by several"
    options: dict[str, Any] = {
        "topology": nanotron_fast.Topology(tp=1 if is_shared else 2),
        "resume": True,
        "overwrite": kind == "over another",
    }
    ended = 0
    for _ in range(kills):
        children = started(
            lambda **more: nanotron_fast.convert(source, out, workers=2, **options, **more),
            random.randint(3, 4) if is_shared else 1,
        )
        time.sleep(random.uniform(0, seconds))
        os.kill(random.choice(children), random.choice(SIGNALS))
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        check(out, [before, wanted])
        if codes == [0] * len(codes):
            ended += 1
            break
        if tree(out) == wanted:
            # It was killed behind its last step: another would be told that there is a checkpoint.
            options["overwrite"] = True
    else:
        nanotron_fast.convert(source, out, **options)
    assert tree(out) == wanted
    assert sorted(os.listdir(root)) == ["out"], os.listdir(root)
    assert not [name for name in os.listdir(out) if name.startswith(".")], os.listdir(out)
    shutil.rmtree(root)
    return ended


def main(source: Path, root: Path, seed: int, num_kills: int) -> None:
    """Kills so many conversions, in destinations of every kind."""
    random.seed(seed)
    started = time.perf_counter()
    nanotron_fast.convert(source, root / "wanted", topology=nanotron_fast.Topology(tp=2))
    seconds = time.perf_counter() - started
    nanotron_fast.convert(source, root / "old")
    wanted, wanted_of_several = tree(root / "wanted"), tree(root / "old")
    killed = ended = 0
    while killed < num_kills:
        for kind in ("beside", "within", "over another", "by several"):
            # Several processes plan several times.
            kills = random.randint(1, 3 if kind == "by several" else 6)
            result = wanted_of_several if kind == "by several" else wanted
            ended += one_round(
                source, root / "round", kind, result, root / "old", kills, 1.3 * seconds
            )
            killed += kills
    print(f"{killed} kills, {ended} came too late")


if __name__ == "__main__":
    with small_cuts(4096):
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
