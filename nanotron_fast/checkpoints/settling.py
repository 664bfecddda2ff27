"""What becomes of what earlier runs have left: it is gone on with, swept away, or kept and told of.

Nothing is lost that a user did not give up: a run without a word on the matter ends where finished
work lies about.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from nanotron_fast.checkpoints.claims import Share
from nanotron_fast.checkpoints.destination import Destination
from nanotron_fast.checkpoints.fingerprint import Made
from nanotron_fast.checkpoints.journal import Journal
from nanotron_fast.checkpoints.ownership import Holder
from nanotron_fast.checkpoints.partial import Leftover, Partial, whole_outputs
from nanotron_fast.errors import CheckpointError, ConfigError, DestinationError
from nanotron_fast.interruption import held
from nanotron_fast.moves.plan import MovePlan


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user wants of earlier runs.

    Args:
        resume: go on with what fits.
        overwrite_partial: give up the rest; without `resume`, all.
        share: (I, N): this run does one share of N; others' stay.
        finish: all shares are done: this run writes no tensors, and gives up nothing.
    """

    resume: bool = False
    overwrite_partial: bool = False
    share: tuple[int, int] | None = None
    finish: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.share is not None:
            number, total = self.share
            if not 1 <= number <= total:
                raise ConfigError(f"--share {number}/{total}: I of I/N is between 1 and N")
            if self.finish:
                raise ConfigError("--finish: it is for a run of its own, after those with --share")
        if self.finish and self.overwrite_partial:
            raise ConfigError(
                "--finish: it makes DST of what is whole, and gives nothing up; do a share again "
                "with --share I/N --overwrite-partial, then --finish"
            )


def settle(
    destination: Destination, made: Made, transfer: MovePlan, wishes: Wishes, boots: Collection[str]
) -> list[Leftover]:
    """Sweeps what is not worth keeping, and returns what is to be gone on with.

    Args:
        destination: which this run has locked.
        made: what this run makes.
        transfer: all files of it.
        boots: of the machines of this run.

    Raises DestinationError, which says what to do; nothing is lost then.
    """
    with held():
        # In this order: a run claims the destination before it makes its folder. What is of none
        # that goes on now has ended, and its journals are read after that.
        known = {each.run for each in destination.others()}
        living = destination.living()
        _refuse_living(destination, living, wishes)
        dead = known - {holder.owner.run for holder, _ in living if holder.owner is not None}
        for leftover in destination.others():
            if leftover.run in dead:
                leftover.undo()
        found = [each for each in destination.others() if each.run in dead]
        _sweep([leftover for leftover in found if not leftover.finished])
        kept = [leftover for leftover in found if leftover.finished]
        mine, siblings = _sorted_out(kept, wishes)
        fitting = [each for each in mine if _difference(each, made) is None]
        others = [each for each in (*mine, *siblings) if _difference(each, made) is not None]
        if wishes.overwrite_partial:
            unwanted = others if wishes.resume else [*mine, *others]
            _sweep({each.path: each for each in unwanted}.values())
            return fitting if wishes.resume else []
        if others and (wishes.resume or wishes.finish or wishes.share):
            raise DestinationError(
                f"{destination.path}: {_what(others[0])} is of another conversion: "
                f"{_difference(others[0], made)}; {_instead(others, wishes)}"
            )
        if mine and not (wishes.resume or wishes.finish):
            share = mine[0].record.share if wishes.share is None else None
            how = "--finish makes DST of all shares" if share else "--resume goes on with it"
            raise DestinationError(
                f"{destination.path}: {_what(mine[0])} is there from a run before; {how}, "
                "--overwrite-partial begins anew"
            )
    if wishes.finish:
        _check_all_there(destination, fitting, transfer, boots)
    return fitting


def _refuse_living(
    destination: Destination, living: Sequence[tuple[Holder, Share | None]], wishes: Wishes
) -> None:
    for holder, share in living:
        if wishes.share and share and share[1] == wishes.share[1]:
            continue
        number = f" (share {share[0]} of {share[1]})" if share else ""
        raise DestinationError(f"{holder.refusal(destination.path)}{number}")


def _sorted_out(kept: Sequence[Leftover], wishes: Wishes) -> tuple[list[Leftover], list[Leftover]]:
    """Those that this run would go on with, and those of the other shares."""
    if wishes.share is None:
        return list(kept), []
    mine = [each for each in kept if each.record.share in (None, wishes.share)]
    return mine, [each for each in kept if each not in mine]


def _difference(leftover: Leftover, made: Made) -> str | None:
    if leftover.record.made is None:
        return "its journal says nothing of what it makes"
    return made.difference(leftover.record.made, mine="now", others="then")


def _instead(others: Sequence[Leftover], wishes: Wishes) -> str:
    """What may be done about what is of another conversion, in words."""
    if not wishes.finish:
        return "repeat that one with --resume, or begin anew with --overwrite-partial"
    shares = {each.record.share for each in others if each.record.share}
    totals = sorted({total for _, total in shares})
    if not totals:
        return "repeat that one with --resume, or remove it"
    those = (_shares(sorted(i for i, n in shares if n == total), total) for total in totals)
    return f"do {' and '.join(those)} again, each with --overwrite-partial, then --finish"


def _what(leftover: Leftover) -> str:
    number = len(leftover.finished)
    age = max(0.0, time.time() - leftover.record.begun)
    share = leftover.record.share
    of = f", share {share[0]} of {share[1]}" if share else ""
    files = "file" if number == 1 else "files"
    return f"{leftover.path} ({number:,} whole {files}, begun {_ago(age)} ago{of})"


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    whole = round(seconds)
    return "1 second" if whole == 1 else f"{whole} seconds"


def _sweep(found: Iterable[Leftover]) -> None:
    for leftover in found:
        leftover.remove()


def _check_all_there(
    destination: Destination,
    fitting: Sequence[Leftover],
    transfer: MovePlan,
    boots: Collection[str],
) -> None:
    """Raises CheckpointError where files are missing, and names the shares that they belong to."""
    there: set[str] = set()
    for leftover in fitting:
        there |= set(whole_outputs(leftover, transfer.outputs, boots))
    missing = [output.path for output in transfer.outputs if output.path not in there]
    if not missing:
        return
    begun: dict[int, set[int]] = {}
    for number, total in (each.record.share for each in fitting if each.record.share):
        begun.setdefault(total, set()).add(number)
    whose = [_shares(_not_done(transfer, total, there), total) for total in sorted(begun)]
    if len(begun) > 1:
        those = " and ".join(_shares(sorted(begun[total]), total) for total in sorted(begun))
        why = f": {those} are there, of different N; {', or '.join(whose)} are still to be done"
    elif whose:
        why = f": {whose[0]} are not done; do each with --share, then --finish"
    else:
        why = f", {missing[0]} first; do the shares with --share I/N, then --finish"
    raise CheckpointError(
        f"{destination.path}: {len(missing):,} of {len(transfer.outputs):,} files are missing{why}"
    )


def _not_done(transfer: MovePlan, total: int, there: Collection[str]) -> list[int]:
    """The numbers of the shares that files are missing of."""
    return [
        number
        for number in range(1, total + 1)
        if any(each.path not in there for each in transfer.share(number - 1, total).outputs)
    ]


def _shares(numbers: Iterable[int], total: int) -> str:
    """Shares in words: "shares 1, 3 of 4"."""
    return f"shares {', '.join(map(str, numbers))} of {total}"


def take_over(
    found: Sequence[Leftover],
    partial: Partial,
    journal: Journal,
    transfer: MovePlan,
    boots: Collection[str],
    taken: set[str],
) -> None:
    """Moves what earlier runs have finished to the folder of this one, and removes their folders.

    Adds the paths of what was moved to `taken`, one by one: an error may come between them. Raises
    OSError.
    """
    for leftover in found:
        whole = whole_outputs(leftover, transfer.outputs, boots)
        more = {name: entry for name, entry in whole.items() if name not in taken}
        with held():
            leftover.hand_over(more, partial, journal, taken)
            leftover.remove()
