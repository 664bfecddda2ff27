"""Files in parts: what journals say of them, and what is proved before they count as whole."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from nanotron_fast.checkpoints.cut_files import check_written, cut_in, written_parts
from nanotron_fast.checkpoints.journal import Entry, Journal, read_record
from nanotron_fast.errors import PlanError
from nanotron_fast.moves.files import Folder
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.moves.shares import Part

FILE = OutputFile("layer/weight", b"", 30)
OTHER = OutputFile("norm", b"", 4)


def part(begin: int, end: int, **more: object) -> dict[str, Any]:
    """A line of a journal."""
    noted = {"file": FILE.path, "size": 30, "synced": True, "boot": "b", "part": [begin, end]}
    return {**noted, **more}


def read(folder: Path, *journals: list[dict[str, Any]]) -> dict[str, Entry]:
    """What journals with these lines say is whole."""
    for number, lines in enumerate(journals):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"journal-{number}").write_text(text)
    with Folder.open(folder) as opened:
        return dict(read_record(opened).entries)


def test_parts_of_all_journals_make_a_file_whole(tmp_path: Path) -> None:
    found = read(tmp_path, [part(20, 30)], [part(0, 10), part(10, 20)])
    assert found == {FILE.path: Entry(30, True, "b")}


@pytest.mark.parametrize(
    "lines",
    [
        [part(0, 10), part(20, 30)],
        [part(10, 30)],
        [part(0, 20)],
        [part(0, 20), part(10, 30)],
        [part(0, 30), part(0, 30)],
        [part(0, 40)],
        [part(0, 10), part(10, 30, size=31)],
        [part(0, 10), part(10, 10), part(10, 30)],
        [part(0, 10), part(-1, 30)],
        [part(0, 0, part="all")],
        [part(0, 0, part=[0])],
        [part(0, 0, part=[False, 30])],
        [part(0, 0, part=[0.0, 30.0])],
        [part(0, 30, file="../weight")],
    ],
)
def test_what_does_not_make_a_file_whole(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    assert read(tmp_path, lines) == {}


def test_a_file_is_synced_when_its_parts_are(tmp_path: Path) -> None:
    """And of a boot only where all of it is: what another machine had not synced may be lost."""
    of_two = read(tmp_path, [part(0, 10)], [part(10, 30, synced=False)])[FILE.path]
    assert of_two == Entry(30, False, "b")
    of_others = read(tmp_path, [part(0, 10, synced=False)], [part(10, 30, synced=False, boot="c")])
    assert not of_others[FILE.path].counts({"b", "c"})
    synced = read(tmp_path, [part(0, 10)], [part(10, 30, boot="c")])
    assert synced[FILE.path].counts({"d"})


@pytest.mark.parametrize("syncs", [False, True])
def test_processes_note_their_parts(syncs: bool, tmp_path: Path) -> None:
    (tmp_path / "content").mkdir()
    with Folder.open(tmp_path) as folder, Folder.open(tmp_path / "content") as content:
        content.make_hollow(FILE.path, 30)
        journals = [Journal(folder, content, rank, syncs=syncs) for rank in range(2)]
        for journal, ends in zip(journals, ((0, 16), (16, 30)), strict=True):
            assert read_record(folder).entries == {}
            journal.add([OutputFile(FILE.path, b"", 30, part=ends)])
            journal.finish()
            journal.close()
        (entry,) = read_record(folder).entries.values()
    assert (entry.size, entry.is_synced, entry.part) == (30, syncs, None)


def test_a_hollow_file_is_made_once_in_its_whole_size(tmp_path: Path) -> None:
    with Folder.open(tmp_path) as folder:
        folder.make_hollow("a/b/weight", 1 << 30)
        status = os.stat(tmp_path / "a/b/weight")
        assert stat.S_ISREG(status.st_mode)
        assert (status.st_size, status.st_blocks) == (1 << 30, 0)
        with pytest.raises(FileExistsError, match="weight"):
            folder.make_hollow("a/b/weight", 5)
    assert os.stat(tmp_path / "a/b/weight").st_size == 1 << 30


def test_what_was_written_must_make_up_the_files() -> None:
    plan = MovePlan((), (FILE, OTHER), ())
    shares = [[Part(0, 0, 16), Part(1, 0, 4)], [Part(0, 16, 30)]]
    assert cut_in(plan, shares) == [FILE]
    written = [each for parts in shares for each in written_parts(plan.parts(parts).outputs)]
    assert written == [(FILE.path, 0, 16), (FILE.path, 16, 30)]
    check_written([FILE], written)
    with pytest.raises(PlanError, match=r"weight: of its 30 bytes .* have written 0 to 16$"):
        check_written([FILE], written[:1])
    with pytest.raises(PlanError, match=r"weight: of its 30 bytes .* have written none$"):
        check_written([FILE], [])
    with pytest.raises(PlanError, match=r"0 to 16, 0 to 16, 16 to 30$"):
        check_written([FILE], [*written, written[0]])
