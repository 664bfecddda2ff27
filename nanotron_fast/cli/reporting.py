"""What the command line says: plans, progress, results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

from nanotron_fast.checkpoints.remote.mirror import shown
from nanotron_fast.moves.engine import ProgressCallback
from nanotron_fast.units import count, first_few, size

if TYPE_CHECKING:
    from nanotron_fast.checkpoints.carrying_out import Report
    from nanotron_fast.checkpoints.check_manifest import ManifestCheck
    from nanotron_fast.checkpoints.inspect import Inspection
    from nanotron_fast.checkpoints.plan.plan import Plan
    from nanotron_fast.checkpoints.verify import Verification

_PLAIN_SECONDS = 5.0
_MAX_SHOWN = 10
# Blocks of a pipeline that are no decoder layers.
_BLOCKS = {
    "embedding": "embedding",
    "norm": "final norm",
    "head": "head",
    "cast": "cast to fp32",
    "loss": "loss",
}
_FORMATS = {
    "nanotron": "Nanotron",
    "hf": "Hugging Face",
    "dcp": "torch.distributed.checkpoint",
}


def stage_lines(
    layer_stages: tuple[int, ...], other_stages: Mapping[str, int], pp: int
) -> Iterator[str]:
    """For each stage, its layers: "0-11"; "0-5, 12-17" where it has several parts of the model.

    Of a stage without layers, what else it has: `other_stages` are those of the other blocks.
    """
    if not layer_stages:
        return
    for stage in range(pp):
        layers = [layer for layer, owner in enumerate(layer_stages) if owner == stage]
        # Layers that follow each other are equally far ahead of their places in the list.
        runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), _ahead)]
        shown = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
        others = [_BLOCKS[block] for block, owner in other_stages.items() if owner == stage]
        yield f"stage {stage}: {f'layers {shown}' if layers else ', '.join(others) or 'nothing'}"


def _ahead(numbered: tuple[int, int]) -> int:
    place, layer = numbered
    return layer - place


def plan_lines(
    plan: Plan, workers: int, share: tuple[int, int] | None = None, *, io: str = "buffered"
) -> Iterator[str]:
    """A plan, for `--dry-run`, and what one of several shares does of it."""
    to_nanotron = plan.direction == "nanotron"
    yield shown(plan.source)
    yield f"  {_FORMATS[plan.source_format]} -> {_FORMATS[plan.direction]}"
    yield f"  family      {plan.family} ({plan.model_class})"
    yield f"  parameters  {plan.num_parameters:,} in {plan.dtype.short_name}"
    was = "" if plan.source_topology is None else f", was {plan.source_topology}"
    if "nanotron" in (plan.source_format, plan.direction):
        yield f"  topology    {plan.topology}{was}{'' if to_nanotron else ' (of the source)'}"
        for line in stage_lines(plan.layer_stages, plan.other_stages, plan.topology.pp):
            yield f"              {line}"
    if plan.states is not None:
        yield f"  states      {plan.states}, was {plan.source_states}"
    yield f"  read        {size(plan.bytes_read)} from {count(len(plan.transfer.sources), 'file')}"
    yield (
        f"  write       {size(plan.bytes_written)} to {count(len(plan.transfer.outputs), 'file')}"
        f" in {count(len(plan.transfer.moves), 'move')}"
    )
    if share is not None:
        number, total = share
        part = plan.transfer.share(number - 1, total)
        yield (
            f"  share       {number} of {total}: read {size(part.bytes_read)}, write "
            f"{size(part.bytes_written)} to {count(len(part.outputs), 'file')}"
        )
    small = ", ".join(sorted((*plan.documents, *plan.copies)))
    yield f"  beside      {small if share is None else f'nothing; --finish writes {small}'}"
    memory = plan.peak_memory_bytes(workers, io=io)
    yield f"  memory      {size(memory)} with {count(workers, 'worker')}"
    yield from (f"  {line}" for line in _left_out(plan.ignored, plan.left_behind))


def report_lines(report: Report) -> Iterator[str]:
    """What a conversion did."""
    plan = report.plan
    if plan.source_topology is not None:
        before = f"{shown(plan.source)} ({plan.source_topology})"
        way = f"{before} -> {report.destination} ({plan.topology})"
    elif plan.direction == "nanotron":
        way = f"{plan.topology} -> {report.destination}"
    elif plan.source_format != "nanotron":
        way = f"{shown(plan.source)} -> {report.destination}"
    else:
        way = f"{shown(plan.source)} ({plan.topology}) -> {report.destination}"
    yield f"{plan.family}, {plan.num_parameters:,} parameters, {way}"
    if plan.states is not None:
        yield f"states of training: {plan.source_states} -> {plan.states}"
    if report.share is not None:
        number, total = report.share
        yield f"share {number} of {total}: --finish makes {report.destination} when all are done"
    rest = len(plan.transfer.outputs) - len(report.part.outputs)
    if rest and report.share is None:
        were = "was" if rest == 1 else "were"
        yield f"{count(rest, 'file')} of {len(plan.transfer.outputs):,} {were} whole before"
    yield (
        f"{size(report.part.bytes_written)} in {count(len(report.part.outputs), 'file')}, "
        f"{report.seconds:.2f} s, {report.gigabytes_per_second:.2f} GB/s, "
        f"peak memory {size(report.peak_rss_bytes)}"
    )
    yield from _left_out(plan.ignored, plan.left_behind)


def _left_out(ignored: tuple[str, ...], left_behind: tuple[str, ...] = ()) -> Iterator[str]:
    """What a user may miss: tensors, and files beside the source."""
    if ignored:
        yield f"ignored {count(len(ignored), 'tensor')}: {first_few(ignored, _MAX_SHOWN)}"
    if left_behind:
        yield f"left behind: {first_few(left_behind, _MAX_SHOWN)}"


def verification_lines(result: Verification) -> Iterator[str]:
    """What a comparison found."""
    for item in result.differing[:_MAX_SHOWN]:
        yield f"differs: {item.name}: {item.reason}"
    if len(result.differing) > _MAX_SHOWN:
        yield f"... and {len(result.differing) - _MAX_SHOWN} more"
    yield from _left_out(result.ignored)
    for cast in result.casts:
        yield f"cast before comparing: {cast}"
    if result.logits is not None:
        logits = result.logits
        yield (
            f"logits of {logits.num_tokens} tokens: largest difference "
            f"{logits.max_difference:.3g}, of values up to {logits.max_magnitude:.3g} "
            f"({logits.tolerance:.3g} is allowed); the largest logit is at the same place for "
            f"{logits.num_same_argmax} of {logits.num_tokens}"
        )
        yield f"  A by {logits.programs[0]}, B by {logits.programs[1]}"
    if result.no_logits is not None:
        yield f"logits were not run: {result.no_logits}"
    verdict = "equal" if result.equal else f"different in {len(result.differing)}"
    yield f"{verdict}: {count(result.tensors_compared, 'tensor')}, {size(result.bytes_compared)}"


def manifest_lines(found: ManifestCheck) -> Iterator[str]:
    """What a check against a manifest found: every finding, for each is a loss."""
    for item in found.findings:
        yield f"differs: {item}"
    verdict = "intact" if found.intact else f"damaged in {count(len(found.findings), 'place')}"
    yield (
        f"{verdict}: {count(found.tensors_checked, 'tensor')} in "
        f"{count(found.files_checked, 'file')}, {size(found.bytes_checked)}"
    )


def inspection_lines(found: Inspection) -> Iterator[str]:
    """What a checkpoint is."""
    yield f"{found.path}"
    yield f"  format      {_FORMATS[found.format]}"
    if found.family:
        kind = f" ({found.model_class})" if found.model_class else ""
        yield f"  family      {found.family}{kind}"
    if found.problem:
        yield f"  problem     {found.problem}"
    if found.spec:
        spec = found.spec
        yield (
            f"  model       {spec.num_layers} layers, hidden {spec.hidden_size}, "
            f"{spec.num_heads} heads of {spec.head_dim}, {spec.num_kv_heads} for keys and values, "
            f"MLP {spec.intermediate_size}, vocabulary {spec.vocab_size:,}"
            f"{', tied' if spec.tie_word_embeddings else ''}"
        )
    if found.rope_interleaved:
        yield "  rotary      neighbours (interleaved)"
    if found.topology:
        yield f"  topology    {found.topology}"
        for line in stage_lines(found.layer_stages, found.other_stages, found.topology.pp):
            yield f"              {line}"
    if found.kv_head_copies is not None and found.kv_head_copies > 1:
        yield f"              {found.kv_head_copies} ranks have a copy of each key-value head"
    if found.ranks_there:
        yield (
            f"  partial     files of ranks {found.ranks_there} of {found.topology} are there "
            "alone, as --ranks-only writes them"
        )
    dtypes = ", ".join(f"{name} {count:,}" for name, count in found.dtypes.items())
    yield f"  elements    {dtypes}"
    if found.quantization:
        yield f"  quantised   {found.quantization}; convert writes it dequantised"
    yield (
        f"  stored      {count(found.num_tensors, 'tensor')} in "
        f"{count(found.tensor_files, 'file')}, {size(found.num_bytes)}"
    )


class Progress:
    """A bar on a terminal, a line now and then elsewhere, or nothing."""

    def __init__(self, *, is_quiet: bool) -> None:
        self.total_bytes = 0
        self._is_quiet = is_quiet
        self._started = time.monotonic()

    def expect(self, num_bytes: int) -> None:
        """Says how much there is to do, from now on."""
        self.total_bytes = num_bytes
        self._started = time.monotonic()

    @contextmanager
    def running(self, verb: str) -> Iterator[ProgressCallback | None]:
        """The callback to hand on; the total may be set later."""
        self._started = time.monotonic()
        if self._is_quiet:
            yield None
        elif sys.stderr.isatty():
            with self._bar(verb) as callback:
                yield callback
        else:
            yield self._lines(verb)

    @contextmanager
    def _bar(self, verb: str) -> Iterator[ProgressCallback]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TaskProgressColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            "{task.description}",
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(verb, total=None)
            yield lambda done: bar.update(task, completed=done, total=self.total_bytes or None)

    def _lines(self, verb: str) -> ProgressCallback:
        last = 0.0

        def report(done: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - max(last, self._started) < _PLAIN_SECONDS:
                return
            last = now
            speed = done / (now - self._started)
            words = [f"{verb}: {size(done)}", f"{size(speed)}/s"]
            if self.total_bytes:
                words[0] += f" of {size(self.total_bytes)}"
            if 0 < done < self.total_bytes:
                words.append(f"{(self.total_bytes - done) / speed:.0f} s left")
            print(", ".join(words), file=sys.stderr, flush=True)

        return report


@contextmanager
def counting(verb: str, total: int, *, is_quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar for what is counted, on a terminal alone; yields what to tell how many are done."""
    if is_quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda done: bar.update(task, completed=done)
