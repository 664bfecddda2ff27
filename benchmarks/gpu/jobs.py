"""What a run consists of, in order: names and limits alone, so that listing it imports nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks.training.variants import ANCHOR, COMPILED, LIGER, OURS, ROW_SECONDS

# Operation -> the module of benchmarks.gpu.checks that has it, and its variants. The first of them
# is what the ways of `WAYS` are tried on.
CHECKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rms_norm": (
        "norms",
        tuple(
            f"{hidden}{residual}"
            for hidden in (4096, 8192, 16384, 32768)
            for residual in ("", " residual")
        ),
    ),
    "glu": ("norms", ("silu", "gelu", "gelu_tanh")),
    "rope_qkv": ("rotary", ("halves", "interleaved", "partial, positions", "in place")),
    "rope_apart": ("rotary", ("keys and values", "keys, interleaved", "partial, positions")),
    "rope_normed": ("rotary", ("halves", "interleaved", "partial, positions")),
    "attention": (
        "attention",
        tuple(
            f"{backend} {case}"
            for backend in (
                *("triton", "auto", "sdpa_cudnn", "sdpa_flash"),
                *("sdpa_varlen", "flash_attn_3", "flash_attn_2"),
            )
            for case in ("dense", "documents", "window", "gqa")
        ),
    ),
    "cross_entropy": (
        "losses",
        ("plain", "z-loss, ignore_index", "correct z-loss", "small vocabulary, z-loss"),
    ),
    "linear_cross_entropy": (
        "losses",
        ("mean", "z-loss, ignore_index", "none", "mean, in chunks", "none, in chunks"),
    ),
    "embedding": ("losses", ("plain", "padding_idx")),
    "adamw": ("optimizer", ("masters and copies", "low-precision state")),
    "accumulate": ("optimizer", ("bf16", "mixed")),
    "clip": ("optimizer", ("clips", "within its bound", "infinity")),
    "pack": ("packing", ("triton qkv", "triton transpose", "cuda qkv", "cuda transpose")),
    "column_linear": ("blocks", ("plain", "main_grad, bias", "a group of one")),
    "row_linear": ("blocks", ("plain", "main_grad, bias", "a group of one")),
    "mlp_block": ("blocks", ("fused", "unfused", "main_grad", "a group of one")),
    "attention_block": ("blocks", ("fused", "unfused", "main_grad", "documents", "a group of one")),
}
OPERATIONS = tuple(CHECKS)
# How a variant is tried beside its own check, and how many seconds that may take: Inductor's first
# code in a process alone can take as long as a whole check.
WAYS = {"captured": 20.0, "compiled": 60.0, "deterministic": 20.0}
# The variant that a way is tried on, where that is not the first.
_TRIED_ON = {("pack", "captured"): "cuda qkv", ("attention", "deterministic"): "auto dense"}
# Without it torch refuses cuBLAS's products where its algorithms are to be deterministic.
_DETERMINISTIC = (("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),)
# How many cases each operation is timed in, where that is more than one: on a GPU, and dry.
RATIO_CASES = {
    "rms_norm": (6, 2),
    "glu": (2, 1),
    "rope_qkv": (2, 1),
    "rope_apart": (2, 1),
    "rope_normed": (2, 1),
    "attention": (3, 1),
    "cross_entropy": (2, 1),
    "linear_cross_entropy": (2, 1),
    "embedding": (2, 1),
    "pack": (2, 2),
    "mlp_block": (2, 2),
    "attention_block": (2, 2),
}
# Those that are timed beside torch and nothing else.
_WITHOUT_OTHERS = ("adamw", "accumulate", "clip", "column_linear", "row_linear")
# Those that are timed beside what torch.compile makes of the same.
_COMPILED = (
    *("rms_norm", "glu", "rope_qkv", "rope_apart", "rope_normed", "cross_entropy"),
    *("linear_cross_entropy", "embedding", "mlp_block", "attention_block"),
)
MODELS = ("1.1B", "3B")
# Of benchmarks/training: what is timed there is timed here side by side, the compiled last.
BESIDE = ("1B, 4k tokens", "3B, 4k tokens")
_SIDES = (ANCHOR, OURS, LIGER)

CHECK_SECONDS = 20.0
PRECOMPILE_SECONDS = 60.0
RATIO_SECONDS = 45.0
STEP_SECONDS = 75.0
BUILD_SECONDS = 500.0
# A run of training compiles twenty kernels before its first step.
TEST_SECONDS = 60.0
# What launches kernels that have many configurations: dealt out to so many processes.
_SHARDS = {
    "triton dense": 4,
    "triton documents": 4,
    "triton window": 4,
    "triton gqa": 4,
    "fused": 4,
}


@dataclass(frozen=True)
class Job:
    """A process of its own: a function of benchmarks.gpu, or a command."""

    kind: str
    operation: str
    variant: str = ""
    target: str = ""
    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    limit: float = CHECK_SECONDS
    # The operation of a job that must have ended before.
    after: str = ""
    # Its end is a fact of its own, a row; otherwise it speaks for itself, unless it fails.
    says_when_done: bool = False

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.kind, self.operation, self.variant)))


@dataclass(frozen=True)
class Phase:
    """Jobs of which so many run at a time; none starts past this share of the budget."""

    name: str
    jobs: tuple[Job, ...]
    workers: int
    until: float = 1.0
    # What was tuned by the clock before, while other jobs had the GPU too, is tuned anew.
    tunes_anew: bool = False


def variant_of(operation: str, variant: str) -> str:
    """The variant that a check builds: of a way, what is treated so."""
    if variant in WAYS:
        return _TRIED_ON.get((operation, variant), CHECKS[operation][1][0])
    return variant


def variants_of_ours(operation: str) -> tuple[str, ...]:
    """Those whose checks launch kernels of ours in Triton, and not a library's or the CUDA ones."""
    module, variants = CHECKS[operation]
    if operation in ("column_linear", "row_linear"):
        return ()
    kinds = {"attention": ("triton",), "packing": ("triton",)}.get(module, ("",))
    return tuple(v for v in variants if v.startswith(kinds) and v != "a group of one")


def _later(jobs: Iterable[tuple[int, Job]]) -> Iterator[Job]:
    """The first of each operation before the second of any."""
    return (job for _, job in sorted(jobs, key=lambda placed: placed[0]))


def correctness(dry: bool) -> Iterator[Job]:
    plain, extra = [], []
    for operation, (module, variants) in CHECKS.items():
        target = f"checks.{module}:check"

        def needs(variant: str, module: str = module, operation: str = operation) -> str:
            if module != "packing":
                return ""
            is_cuda = variant_of(operation, variant).startswith("cuda")
            return "native build with CUDA" if is_cuda else "native build"

        for place, variant in enumerate(variants):
            is_library = operation == "attention" and not variant.startswith("triton")
            if dry and (is_library or variant.startswith("cuda")):
                continue
            job = Job("check", operation, variant, target, after=needs(variant))
            plain.append((place, job))
        for place, (way, limit) in enumerate(WAYS.items()):
            if not (dry and way == "captured"):
                environment = _DETERMINISTIC if way == "deterministic" else ()
                how = Job("check", operation, way, target, (), environment, limit, needs(way))
                extra.append((place, how))
    yield from _later(plain)
    yield from _later(extra)


def precompilation() -> Iterator[Job]:
    """Every kernel once: those of a library, and those that another variant has, are left out."""
    for operation, (module, variants) in CHECKS.items():
        for variant in variants:
            is_block = module == "blocks" and variant != "fused"
            is_library = operation == "attention" and not variant.startswith("triton")
            if is_block or is_library or variant.startswith("cuda"):
                continue
            shards = _SHARDS.get(variant, 1)
            for shard in range(shards):
                share = f"{shard}/{shards}"
                yield Job(
                    "machine",
                    operation,
                    variant if shards == 1 else f"{variant} {share}",
                    f"checks.{module}:precompile",
                    environment=(("NANOTRON_FAST_SHARD", share),),
                    limit=PRECOMPILE_SECONDS,
                )


def inductions() -> Iterator[Job]:
    """What torch.compile makes for the timings, of several at a time: each takes it ten seconds."""
    for name in _COMPILED:
        target, limit = "ratios:precompile", PRECOMPILE_SECONDS
        yield Job("machine", name, "by torch.compile", target, limit=limit)


def native_builds(dry: bool) -> Iterator[Job]:
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    common = {"kind": "machine", "command": command, "limit": BUILD_SECONDS, "says_when_done": True}
    # First without CUDA, which takes minutes: what checks a table of moves is in the other part.
    without = (("NANOTRON_FAST_CUDA", "0"),)
    yield Job(operation="native build", environment=without, **common)
    if not dry:
        yield Job(operation="native build with CUDA", after="native build", **common)


def suite(dry: bool, workers: int) -> Job:
    paths: tuple[str, ...] = ("tests/kernels", "tests/parallel", "tests/train/test_on_gpu.py")
    if dry:
        paths = ("tests/kernels/test_glu.py", "-k", "bfloat16 and silu")
    parallel = ("-n", str(workers)) if workers > 1 and find_spec("xdist") else ()
    options = ("-q", "-p", "benchmarks.gpu.pytest_rows", "-p", "no:cacheprovider")
    command = (sys.executable, "-m", "pytest", *options, *parallel, *paths)
    return Job("test", "pytest", command=command, limit=1e6)


def timings(dry: bool) -> Iterator[Job]:
    """Ours and torch in the first case of every operation, then all else in it, then the rest."""

    def job(operation: str, variant: str) -> Job:
        build = "native build" if dry else "native build with CUDA"
        after = build if operation == "pack" else ""
        return Job("ratio", operation, variant, "ratios:run", limit=RATIO_SECONDS, after=after)

    yield from (job(operation, "ours") for operation in OPERATIONS)
    yield from (job(name, "others") for name in OPERATIONS if name not in _WITHOUT_OTHERS)
    counts = {name: RATIO_CASES.get(name, (1, 1))[int(dry)] for name in OPERATIONS}
    for place in range(1, max(counts.values())):
        yield from (job(name, f"case {place}") for name, count in counts.items() if place < count)


def phases(dry: bool, cpus: int) -> list[Phase]:
    """All of it, the most valuable facts first."""
    several = min(2, cpus) if dry else min(8, max(4, cpus // 2))
    machine = [Job("machine", "versions", target="machine:versions")]
    machine += [Job("machine", "ceilings", target="machine:ceilings", limit=60.0)]
    compiling = () if dry else (*precompilation(), *inductions())
    steps = [
        Job("step", model, side, target="step:run", limit=STEP_SECONDS)
        for side in ("ours", "torch")
        for model in MODELS
    ]
    pairs = [(setting, side) for setting in BESIDE for side in _SIDES]
    pairs += [(setting, COMPILED) for setting in BESIDE]
    beside = [Job("step", *pair, target="beside:run", limit=ROW_SECONDS) for pair in pairs]
    one = several if dry else 1  # side by side they would share the GPU, and time each other
    return [
        Phase("machine", tuple(machine), 1),
        Phase("precompile", compiling, min(12, cpus), 0.25),
        Phase("check", tuple(correctness(dry)), several, 0.5),
        Phase("ratio", tuple(timings(dry)), one, 0.64, tunes_anew=True),
        Phase("step", tuple(steps), one, 0.78),
        Phase("beside", tuple(beside), one, 0.9),
        Phase("test", (suite(dry, 1 if dry else min(8, cpus)),), 1),
    ]
