"""Times what the converter does for runs that may end early, or that share the work.

Cost of the journal, of going on with what is whole, of a manifest; two processes of one worker
beside one of two. Rounds are interleaved, as in bench_convert.py, whose measure this is; ratios are
to the first variant of a case.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import models
from bench_convert import RESULTS, Case, convert, environment, measure, same_as, show

# The command with its journal written to nowhere.
NO_JOURNAL = """
import sys
from nanotron_fast.checkpoints.journal import Journal
Journal.add = lambda self, outputs: None
sys.argv[0] = "nanotron-fast"
from nanotron_fast.__main__ import main
main()
"""
# The command, killed by itself when a share of its files is whole.
STOPPED = """
import os, sys
from nanotron_fast.moves import engine
execute = engine.execute
def stop(plan, root, **given):
    number = int(len(plan.outputs) * {share})
    execute(plan.without({{each.path for each in plan.outputs[number:]}}), root, **given)
    os._exit(0)
engine.execute = stop
sys.argv[0] = "nanotron-fast"
from nanotron_fast.__main__ import main
main()
"""


def script(text: str, *words: str) -> list[str]:
    return [sys.executable, "-c", text, *words]


def in_shell(*commands: list[str], at_once: bool = False) -> list[str]:
    """Several commands as one, one after another or at once; the last one's output is shown."""
    quoted = [" ".join(f"'{word}'" if word != "{out}" else word for word in c) for c in commands]
    if not at_once:
        return [
            "sh",
            "-ec",
            "\n".join([*(f"{each} >/dev/null" for each in quoted[:-1]), quoted[-1]]),
        ]
    first, last = quoted[:-1], quoted[-1]
    return ["sh", "-ec", " & ".join(f"{each} >/dev/null" for each in first) + f" & wait\n{last}"]


def cases(work: Path, shape: str) -> list[Case]:
    source = work / "hf"
    models.make_model(source, shape)
    plain = convert(source, "--workers", "2")
    share = [convert(source, "--workers", "1", "--share", f"{number}/2") for number in (1, 2)]
    finish = convert(source, "--finish")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["convert", str(source), "{out}"]
    sums = "mkdir {{out}}; find {source} -type f | sort | xargs -P 2 -n 1 sha256sum > {{out}}/sums"
    return [
        Case(
            f"{shape}: processes",
            source,
            {
                "one process, 2 workers": plain,
                "one process, 2 workers, --fsync": [*plain, "--fsync"],
                "nanotron-fast, two shares": in_shell(*share, finish, at_once=True),
                "nanotron-fast, torchrun of 2": [
                    *(*torchrun, "-m", "nanotron_fast", *words, "--workers", "1", "--json")
                ],
            },
            "two shares no slower than one process with --fsync, but for their starts",
            same_as(source),
        ),
        Case(
            f"{shape}: journal",
            source,
            {
                "without a journal": script(NO_JOURNAL, *words, "--json", "--workers", "2"),
                "nanotron-fast": plain,
            },
            "1.02x",
            same_as(source),
        ),
        Case(
            f"{shape}: going on",
            source,
            {
                "in one run": plain,
                "nanotron-fast, half and the rest": in_shell(
                    script(STOPPED.format(share=0.5), *words), [*plain, "--resume"]
                ),
                "nanotron-fast, all and the rest": in_shell(
                    script(STOPPED.format(share=1.0), *words), [*plain, "--resume"]
                ),
            },
            "the time of one run, and a start",
            same_as(source),
        ),
        Case(
            f"{shape}: manifest",
            source,
            {
                "nanotron-fast": plain,
                "nanotron-fast --manifest": [*plain, "--manifest"],
                "sha256sum, two at once": ["sh", "-ec", sums.format(source=work / "split")],
            },
            "what it adds is at most what sha256sum takes",
            same_as(source),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="tinyllama-1.1b", choices=[*models.SHAPES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="cases whose title has this in it")
    parser.add_argument("--directory", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cluster.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="nanotron_fast-bench-") as folder:
        work = Path(folder)
        found = environment()
        print(", ".join(f"{key} {value}" for key, value in found.items()))
        results = []
        for case in cases(work, args.shape):
            if args.only and args.only not in case.title:
                continue
            if "manifest" in case.title:
                # What is summed has files of the same sizes as what is written.
                command = [
                    word.replace("{out}", str(work / "split")) for word in convert(case.source)
                ]
                os.spawnvp(os.P_WAIT, command[0], [*command, "--quiet"])
            results.append(measure(case, args.rounds, work))
            show(results[-1])
        if args.save:
            document = {"environment": found, "rounds": args.rounds, "cases": results}
            path = RESULTS / "cluster.json"
            path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
