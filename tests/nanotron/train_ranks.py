"""A rank of real Nanotron on the CPU: `python -m tests.nanotron.train_ranks FOLDER PORT CASE...`"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanotron_fast.patch.cpu import cpu_mode
from nanotron_fast.patch.importing import import_nanotron
from tests.nanotron.training import Case, path_of, start, train
from tests.parallel.ranks import run_cases


def train_and_save(case: Case, context: Any, folder: Path) -> None:
    result = train(case, context)
    print(case.word, "losses", *result["losses"])
    torch.save(result, path_of(folder, case, int(os.environ["RANK"])))


def cases(folder: str, port: str, *words: str) -> Iterator[tuple[str, Any]]:
    import_nanotron()
    context = start(int(port))
    for word in words:
        yield word, partial(train_and_save, Case.from_word(word), context, Path(folder))


if __name__ == "__main__":
    with cpu_mode():
        run_cases(cases(*sys.argv[1:]))
