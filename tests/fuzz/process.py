"""The process of one target: python -m tests.fuzz.process NAME SECONDS [--plain]"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tests.fuzz import CORPUS, FOUND, MAX_INPUT_BYTES, MEMORY_MIB


def main(name: str, seconds: int, *, is_plain: bool) -> None:
    """Fuzzes it; ends the process at the first find, which is kept, with exit code 1."""
    if not is_plain:
        import atheris

    def instrumented() -> AbstractContextManager[None]:
        """What is imported within tells libFuzzer which way it goes."""
        return nullcontext() if is_plain else atheris.instrument_imports(include=["nanotron_fast"])

    with instrumented():
        from tests.fuzz.mutations import mutated
        from tests.fuzz.oracle import Finding, check, make_box
        from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix="nanotron_fast-fuzz-"))
    box = make_box(folder / "box")
    count = 0
    end = time.monotonic() + seconds
    # What a machine lacks is an error of ours as well, and no find by the kernel's hand.
    if is_plain:
        resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY_MIB << 20,) * 2)

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        try:
            check(target, data, box)
        except Finding:
            traceback.print_exc()
            path = FOUND / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
            path.write_bytes(data)
            print(f"{count:,} inputs, the last of which is {path}", flush=True)
            os._exit(1)
        if time.monotonic() > end:
            print(f"{count:,} inputs", flush=True)
            os._exit(0)

    with instrumented():  # what is imported only when it is needed is so now
        seeds = [*target.seeds(), *(path.read_bytes() for path in sorted(CORPUS.glob(f"{name}-*")))]
        for seed in seeds:
            one(seed)
    if is_plain:
        chance = random.Random()
        while True:
            one(mutated(chance.choice(seeds), seeds, chance))
    for number, seed in enumerate(seeds):
        (folder / "corpus").mkdir(exist_ok=True)
        (folder / "corpus" / str(number)).write_bytes(seed)

    def custom(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return mutated(data, seeds, chance)[:max_size]

    atheris.Setup(
        [
            *(sys.argv[0], f"-max_len={MAX_INPUT_BYTES}", f"-rss_limit_mb={MEMORY_MIB}"),
            *("-timeout=60", f"-artifact_prefix={FOUND}/{name}-", "-len_control=0"),
            str(folder / "corpus"),
        ],
        one,
        custom_mutator=custom,
        internal_libfuzzer=True,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), is_plain="--plain" in sys.argv)
