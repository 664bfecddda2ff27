"""Which of our kernels a piece of work launches, and launches that only compile."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

OURS = "nanotron_fast.kernels"


@contextmanager
def _replaced(kind: type, run: Callable[..., Any]) -> Iterator[None]:
    original = kind.run
    kind.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.run = original  # type: ignore[method-assign]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts launches of our kernels, compiled or interpreted, by the kernel's name."""
    counts: Counter[str] = Counter()

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *args: Any, **options: Any) -> Any:
            result = original(self, *args, **options)
            if self.fn.__module__.startswith(OURS):
                counts[f"{self.fn.__module__.removeprefix(OURS)[1:]}.{self.fn.__name__}"] += 1
            return result

        return run

    with (
        _replaced(JITFunction, counting(JITFunction.run)),
        _replaced(InterpretedFunction, counting(InterpretedFunction.run)),
    ):
        yield counts


@contextmanager
def compiled_only(shard: str = "0/1") -> Iterator[Counter[str]]:
    """Launches compile, into Triton's cache, and do not run: what they should write is garbage.

    Of a tuned kernel every configuration that would be timed is compiled; with shard "i/n", each
    n-th of them from the i-th on. Gives the compiled kernels by name.
    """
    counts: Counter[str] = Counter()
    first, step = map(int, shard.split("/"))
    compile_kernel = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        counts[self.fn.__name__] += 1
        return compile_kernel(self, *args, **(options | {"warmup": True}))

    def run_tuned(self: Any, *args: Any, **options: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(options)[first::step]:
            self.fn.run(*args, **options, **config.all_kwargs())

    with _replaced(JITFunction, run), _replaced(Autotuner, run_tuned):
        yield counts


def shard_asked_for() -> str:
    return os.environ.get("NANOTRON_FAST_SHARD", "0/1")
