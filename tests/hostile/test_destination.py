"""Destinations that are in the way, too small, contested, or left by a run that was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast import Topology
from nanotron_fast.checkpoints import carrying_out as conversion
from nanotron_fast.checkpoints import placing
from nanotron_fast.checkpoints.destination import Destination
from nanotron_fast.errors import CheckpointError, DestinationError, NanotronFastError
from nanotron_fast.moves import engine
from tests.modelzoo import make, read_tensors

MODEL = make("llama", num_hidden_layers=1)
# A conversion that tells when the engine is about to start, and then waits to be killed.
STUCK = """
import sys, time
import nanotron_fast
from nanotron_fast.moves import engine
execute = engine.execute
def stuck(*args, **kwargs):
    execute(*args, **kwargs)
    print("written", flush=True)
    time.sleep(60)
engine.execute = stuck
nanotron_fast.convert(sys.argv[1], sys.argv[2], overwrite=True)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return MODEL.save(tmp_path / "source")


@pytest.fixture
def stuck(source: Path, tmp_path: Path) -> Any:
    """A run in another process that has written all tensors and not yet committed them."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(source), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    yield process
    process.kill()
    process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(source: Path, out: Path, message: str, **options: Any) -> None:
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(DestinationError, match=message) as caught:
        nanotron_fast.convert(source, out, **options)
    assert isinstance(caught.value, OSError)
    assert sorted(source.parent.rglob("*")) == before


def old_checkpoint(folder: Path) -> None:
    """Something that `overwrite` may replace."""
    folder.mkdir()
    (folder / "config.json").write_text("old")
    (folder / "model.safetensors").write_text("old")


def test_parents_are_made(source: Path, tmp_path: Path) -> None:
    nanotron_fast.convert(source, tmp_path / "a" / "b" / "out")
    assert names(tmp_path / "a" / "b") == ["out"]


def test_an_empty_directory_is_fine(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    nanotron_fast.convert(source, tmp_path / "out")
    assert "model_config.json" in names(tmp_path / "out")
    assert names(tmp_path) == ["out", "source"]


def test_not_empty(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("yes")
    refused(source, tmp_path / "out", "out: it is not empty; --overwrite replaces it")
    assert (tmp_path / "out" / "precious").read_text() == "yes"


def test_overwrite_replaces_everything(source: Path, tmp_path: Path) -> None:
    nanotron_fast.convert(source, tmp_path / "out", topology=Topology(tp=4))
    (tmp_path / "out" / "README.md").write_text("old")
    nanotron_fast.convert(source, tmp_path / "out", topology=Topology(tp=2), overwrite=True)
    assert not (tmp_path / "out" / "README.md").exists()
    assert not list((tmp_path / "out").rglob("*of-4*"))
    assert names(tmp_path) == ["out", "source"]


def test_overwrite_leaves_the_old_one_where_the_new_one_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_checkpoint(tmp_path / "out")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(conversion, "write_file", fail)
    with pytest.raises(OSError, match="No space left"):
        nanotron_fast.convert(source, tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"
    monkeypatch.undo()
    nanotron_fast.convert(source, tmp_path / "out", overwrite=True, overwrite_partial=True)
    assert names(tmp_path) == ["out", "source"]


def test_overwrite_with_a_bad_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("yes")
    (source / "model.safetensors").write_bytes(b"?")
    with pytest.raises(CheckpointError):
        nanotron_fast.convert(source, tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out", "source"]
    assert names(tmp_path / "out") == ["precious"]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("source", "the destination is the source"),
        ("source/.", "the destination is the source"),
        ("link", "the destination is the source"),
        ("source/inside", "lies inside the source"),
        ("source/a/b/c", "lies inside the source"),
        ("link/inside", "lies inside the source"),
        ("source/../source/inside", "lies inside the source"),
        (".", "the source .* lies inside the destination"),
        ("source/..", "the source .* lies inside the destination"),
    ],
)
def test_source_and_destination_within_each_other(
    where: str, message: str, overwrite: bool, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("source")
    refused(source, tmp_path / where, message, overwrite=overwrite)


def test_source_by_a_link_that_lies_in_the_destination(source: Path, tmp_path: Path) -> None:
    """Overwriting the destination takes a link away, not the source."""
    old_checkpoint(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.model").symlink_to(source)
    nanotron_fast.convert(tmp_path / "out" / "tokenizer.model", tmp_path / "out", overwrite=True)
    assert read_tensors(source) == MODEL.tensors


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file(overwrite: bool, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    refused(source, tmp_path / "out", "it is there, and is not a directory", overwrite=overwrite)


def test_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OSError, match="file"):
        nanotron_fast.convert(source, tmp_path / "file" / "out")
    assert names(tmp_path) == ["file", "source"]


def test_a_link_that_leads_nowhere(source: Path, tmp_path: Path) -> None:
    """What it points to is made."""
    (tmp_path / "out").symlink_to("target")
    nanotron_fast.convert(source, tmp_path / "out")
    assert (tmp_path / "target" / "model_config.json").is_file()


@pytest.mark.parametrize("name", ["out.partial", "out.partial-0a1b2c3d"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_named_like_a_partial(name: str, kind: str, source: Path, tmp_path: Path) -> None:
    """It is somebody's, and stays."""
    if kind == "file":
        (tmp_path / name).write_text("precious")
    else:
        folder = tmp_path / ("elsewhere" if kind == "link" else name)
        folder.mkdir()
        (folder / "precious").write_text("yes")
        if kind == "link":
            (tmp_path / name).symlink_to("elsewhere")
    before = [*names(tmp_path), "out"]
    nanotron_fast.convert(source, tmp_path / "out", overwrite_partial=True)
    assert names(tmp_path) == sorted(before)
    if kind != "file":
        assert (tmp_path / name / "precious").read_text() == "yes"


def test_second_run_is_refused(source: Path, tmp_path: Path) -> None:
    """The first holds its lock; the second touches nothing."""
    first = Destination(tmp_path / "out", source=source, overwrite=False)
    first.lock()
    first.open()
    (first.partial.content_path / "half").write_text("half")
    message = f"out: another run is writing to it: process {os.getpid()} on .*, since 20"
    refused(source, tmp_path / "out", message)
    first.abort()
    nanotron_fast.convert(source, tmp_path / "out")


def test_second_run_in_another_process_is_refused(stuck: Any, source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "out", f"another run .*: process {stuck.pid} on")
    for given in ("resume", "overwrite_partial", "finish"):
        refused(source, tmp_path / "out", f"process {stuck.pid} on", **{given: True})


def test_killed_run_leaves_no_destination_and_another_goes_on(
    stuck: Any, source: Path, tmp_path: Path
) -> None:
    stuck.send_signal(signal.SIGKILL)
    stuck.wait()
    assert not (tmp_path / "out").exists()
    message = (
        r"partial-\w+ \([0-9]+ whole files, begun [0-9]+ seconds ago\) is there from a run before; "
        "--resume goes on with it, --overwrite-partial begins anew"
    )
    with pytest.raises(DestinationError, match=message):
        nanotron_fast.convert(source, tmp_path / "out")
    report = nanotron_fast.convert(source, tmp_path / "out", resume=True)
    assert not report.part.outputs
    assert names(tmp_path) == ["out", "source"]
    nanotron_fast.convert(tmp_path / "out", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == MODEL.tensors


def test_interrupted_run_leaves_what_is_whole(stuck: Any, source: Path, tmp_path: Path) -> None:
    stuck.send_signal(signal.SIGINT)
    _, stderr = stuck.communicate(timeout=20)
    assert b"KeyboardInterrupt" in stderr
    assert b"--resume goes on with them" in stderr
    partial, _ = names(tmp_path)
    assert partial.startswith("out.partial-")
    nanotron_fast.convert(source, tmp_path / "out", overwrite_partial=True)
    assert names(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("error", [SystemExit, RuntimeError])
def test_exception_while_the_engine_runs(
    error: type[BaseException], source: Path, tmp_path: Path
) -> None:
    def raise_it(done: int) -> None:
        raise error

    with pytest.raises(error):
        nanotron_fast.convert(source, tmp_path / "out", on_progress=raise_it)
    # Files that were whole by then stay, whatever ended the run.
    assert all(each.startswith("out.partial-") or each == "source" for each in names(tmp_path))
    nanotron_fast.convert(source, tmp_path / "out", resume=True)
    assert names(tmp_path) == ["out", "source"]


def test_exception_at_the_last_step(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(one: Path, other: Path) -> None:
        raise PermissionError(13, "Permission denied", str(other))

    monkeypatch.setattr(placing, "rename_to_free", fail)
    with pytest.raises(PermissionError) as caught:
        nanotron_fast.convert(source, tmp_path / "out")
    (note,) = caught.value.__notes__
    assert "out is as it was, and" in note
    monkeypatch.undo()
    nanotron_fast.convert(source, tmp_path / "out", resume=True)
    assert names(tmp_path) == ["out", "source"]


@pytest.mark.parametrize(
    "part", ["config.json", "model.safetensors", "model", "nanotron_fast.json", "model_config.json"]
)
def test_exception_while_the_parts_move(
    part: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What should have been replaced is put back, whichever part it fails at."""
    old_checkpoint(tmp_path / "out")
    rename, failed = Path.rename, []

    def fail(self: Path, target: Path) -> Path:
        if self.name == part and not failed:
            failed.append(part)
            raise PermissionError(13, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(Destination, "_can_be_exchanged", lambda self: False)
    with pytest.raises(PermissionError):
        nanotron_fast.convert(source, tmp_path / "out", overwrite=True)
    assert failed
    (partial, *old) = names(tmp_path / "out")
    assert partial.startswith(".nanotron_fast.partial-")
    assert old == ["config.json", "model.safetensors"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    nanotron_fast.convert(source, tmp_path / "out", overwrite=True, resume=True)
    assert names(tmp_path) == ["out", "source"]
    assert "config.json" not in names(tmp_path / "out")


@pytest.mark.parametrize("fails", [False, True])
def test_file_systems_without_an_exchange_of_names(
    fails: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_checkpoint(tmp_path / "out")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if fails and self.name == "content":
            raise PermissionError(13, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(placing, "exchange", lambda one, other: False)
    if fails:
        with pytest.raises(PermissionError):
            nanotron_fast.convert(source, tmp_path / "out", overwrite=True)
        assert names(tmp_path / "out") == ["config.json", "model.safetensors"]
    else:
        nanotron_fast.convert(source, tmp_path / "out", overwrite=True)
        assert names(tmp_path) == ["out", "source"]
        assert nanotron_fast.verify(source, tmp_path / "out").equal


def test_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks count: 20 files of a byte and more take 20 of them."""
    fields = dict.fromkeys(("f_bsize", "f_frsize"), 1 << 20) | {"f_bavail": 10, "f_files": 0}
    fields["f_blocks"] = 1000
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**fields))
    message = "writes [0-9,]+ bytes in blocks of 1,048,576, and 10,485,760 are free"
    refused(source, tmp_path / "out", message)
    refused(source, tmp_path / "not" / "there" / "out", message)
    fields["f_bavail"] = 1000
    fields |= {"f_files": 100, "f_favail": 10}
    refused(source, tmp_path / "out", "writes [0-9]+ files, and the file system has room for 10")
    fields |= {"f_files": 0, "f_blocks": 0, "f_bavail": 0}
    nanotron_fast.convert(source, tmp_path / "out")


def test_disk_that_fills_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when something else takes the room that was there at the start."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "model_weight.safetensors")

    monkeypatch.setattr(engine, "execute", fail)
    with pytest.raises(OSError, match="No space left on device"):
        nanotron_fast.convert(source, tmp_path / "out")
    assert names(tmp_path) == ["source"]


def test_source_that_shrinks_meanwhile(source: Path, tmp_path: Path) -> None:
    def shrink(plan: Any) -> None:
        os.truncate(source / "model.safetensors", 5000)

    with pytest.raises(NanotronFastError, match=r"it had \d+ bytes .*, and has 5000"):
        nanotron_fast.convert(source, tmp_path / "out", on_plan=shrink)
    assert names(tmp_path) == ["source"]


def test_destination_that_fills_up_meanwhile(source: Path, tmp_path: Path) -> None:
    """Somebody else makes it while the conversion runs: it is not replaced."""

    def occupy(plan: Any) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("yes")

    with pytest.raises(DestinationError, match="it is not empty"):
        nanotron_fast.convert(source, tmp_path / "out", on_plan=occupy)
    assert names(tmp_path / "out") == ["precious"]


def test_file_systems_without_links(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock cannot appear with its contents then; it is one all the same."""

    def unsupported(*args: Any, **kwargs: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    first = Destination(tmp_path / "out", source=source, overwrite=False)
    first.lock()
    refused(source, tmp_path / "out", f"another run .*: process {os.getpid()} on")
    first.abort()
    nanotron_fast.convert(source, tmp_path / "out")
    assert names(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("name", ["ö ü", "a'b\"c", "new\nline", "-n", "x" * 200, "..."])
def test_odd_names(name: str, source: Path, tmp_path: Path) -> None:
    nanotron_fast.convert(source, tmp_path / name)
    nanotron_fast.convert(tmp_path / name, tmp_path / "back")
    assert read_tensors(tmp_path / "back") == MODEL.tensors


def test_name_that_is_no_text(source: Path, tmp_path: Path) -> None:
    """Names are bytes; config.yaml spells this one out."""
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    nanotron_fast.convert(source, out)
    assert "config.yaml" in names(out)


def test_read_only_parent(source: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(DestinationError, match="locked/out"):
        nanotron_fast.convert(source, tmp_path / "locked" / "out")


def test_plans_write_nothing(source: Path, tmp_path: Path) -> None:
    before = time.monotonic()
    nanotron_fast.plan(source, tmp_path / "out")
    assert names(tmp_path) == ["source"]
    assert time.monotonic() - before < 20


def test_the_root_of_the_file_system(source: Path) -> None:
    with pytest.raises(DestinationError, match="root of the file system"):
        nanotron_fast.convert(source, "/", overwrite=True)
