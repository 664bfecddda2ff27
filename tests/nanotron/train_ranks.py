"""A rank of real Nanotron on the CPU: `python -m tests.nanotron.train_ranks FOLDER PORT CASE...`"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nanotron_fast.patch.cpu import cpu_mode
from nanotron_fast.patch.importing import import_nanotron
from nanotron_fast.patch.nanotron.registry import disable, enable
from tests.nanotron.training import KERNELS, Case, path_of, start, train
from tests.parallel.ranks import run_cases


def train_and_save(case: Case, context: Any, folder: Path) -> None:
    if case.ops:
        enable(case.ops.split("+"))
    with ExitStack() as stack:
        stack.callback(disable)
        calls = {op: stack.enter_context(_spy(*KERNELS[op])) for op in KERNELS}
        result = train(case, context)
    result["calls"] = {op: spy.call_count for op, spy in calls.items()}
    print(case.word, "losses", *result["losses"])
    torch.save(result, path_of(folder, case, int(os.environ["RANK"])))


def _spy(home: str, kernel: str) -> Any:
    module = importlib.import_module(f"nanotron_fast.patch.nanotron.replacements.{home}")
    return mock.patch.object(module, kernel, wraps=getattr(module, kernel))


def cases(folder: str, port: str, *words: str) -> Iterator[tuple[str, Any]]:
    import_nanotron()
    context = start(int(port))
    for word in words:
        yield word, partial(train_and_save, Case.from_word(word), context, Path(folder))


if __name__ == "__main__":
    with cpu_mode():
        run_cases(cases(*sys.argv[1:]))
