"""Folders that the library `datasets` itself reads; skipped where it is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.text import DatasetRows, open_source
from tests.train.data.test_text import write_jsonl

pytest.importorskip("datasets", reason="these read real datasets: pip install datasets")
TEXTS = [f"text {number}" for number in range(20)]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache of each test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save(path: Path, texts: list[Any] = TEXTS, **columns: list[Any]) -> Path:
    """A parquet file."""
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"text": texts, **columns}).to_parquet(path)
    return path


def rows(name: Any, **options: Any) -> list[Any]:
    source = open_source(name, **options)
    assert isinstance(source, DatasetRows)
    return [row for block in source.blocks() for row in block.rows]


def test_files_folders_and_globs_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("b", "a", "below/c")):
        save(tmp_path / "d" / f"{name}.parquet", TEXTS[number::3])
    joined = [*TEXTS[1::3], *TEXTS[0::3]]
    assert rows(str(tmp_path / "d" / "*.parquet")) == joined
    assert sorted(rows(str(tmp_path / "d"))) == sorted(TEXTS)
    assert rows(str(tmp_path / "d" / "b.parquet")) == TEXTS[0::3]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows("~/d/b.parquet") == TEXTS[0::3]
    assert sorted(rows("~/d")) == sorted(TEXTS)
    # As the Hub's cache has them, whose folders are full of links.
    (tmp_path / "d" / "e.parquet").symlink_to(save(tmp_path / "elsewhere.parquet", ["linked"]))
    assert sorted(rows("~/d")) == sorted([*TEXTS, "linked"])
    (tmp_path / "d" / "e.parquet").unlink()
    # A folder with the name of a format is a folder.
    (tmp_path / "csv").mkdir()
    os.rename(tmp_path / "d" / "b.parquet", tmp_path / "csv" / "b.parquet")
    monkeypatch.chdir(tmp_path)
    assert rows("csv") == rows("csv/*.parquet") == TEXTS[0::3]
    os.renames("csv/b.parquet", "c[x]/b[1].parquet")
    assert rows("c[x]/b[1].parquet") == TEXTS[0::3]
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "a.json").write_text(json.dumps([{"text": each} for each in TEXTS]))
    assert rows(str(tmp_path / "j")) == TEXTS
    with pytest.raises(DataError, match=r"they are files, and have no configuration 'x'$"):
        open_source("~/d/a.parquet", config_name="x")


def test_splits_are_told_apart(tmp_path: Path) -> None:
    save(tmp_path / "d" / "train-00000-of-00001.parquet", TEXTS[:15])
    save(tmp_path / "d" / "validation-00000-of-00001.parquet", TEXTS[15:])
    assert rows(str(tmp_path / "d")) == TEXTS[:15]
    assert rows(str(tmp_path / "d"), split="validation") == TEXTS[15:]
    with pytest.raises(DataError, match=r"d: `datasets` cannot load its split 'dev': Unknown"):
        open_source(str(tmp_path / "d"), split="dev")


def test_what_was_saved_to_disk_has_its_own_splits_alone(tmp_path: Path) -> None:
    """And not all rows under any name that is asked for."""
    from datasets import Dataset, DatasetDict

    whole = Dataset.from_dict({"text": TEXTS})
    whole.save_to_disk(tmp_path / "one")
    assert rows(str(tmp_path / "one")) == TEXTS
    for split in ("validation", "train[:50%]"):
        with pytest.raises(DataError, match=r"one: it was saved to disk as one dataset, and has "):
            open_source(str(tmp_path / "one"), split=split)
    with pytest.raises(DataError, match="it was saved to disk, and has no configuration 'x'"):
        open_source(str(tmp_path / "one"), config_name="x")
    parts = DatasetDict({"ours": whole.select(range(5)), "theirs": whole.select(range(5, 20))})
    parts.save_to_disk(tmp_path / "several")
    assert rows(str(tmp_path / "several"), split="ours") == TEXTS[:5]
    assert rows(str(tmp_path / "several"), split="theirs") == TEXTS[5:]
    with pytest.raises(DataError, match=r"several: it has no split 'train', but ours, theirs"):
        open_source(str(tmp_path / "several"))


def test_of_several_the_column_of_the_text_alone_has_to_agree(tmp_path: Path) -> None:
    one = str(save(tmp_path / "one.parquet", id=list(range(20))))
    other = str(save(tmp_path / "other.parquet", id=["x"] * 20))
    assert rows([one, other]) == TEXTS * 2
    assert sorted(rows({one: 0.5, other: 0.25})) == sorted([*TEXTS[:10], *TEXTS[:5]])
    numbers = str(save(tmp_path / "numbers.parquet", list(range(20))))
    for names in ([one, numbers], {one: 0.5, numbers: 0.5}):
        with pytest.raises(DataError, match=r"numbers\.parquet: they cannot be joined: The feat"):
            open_source(names)
    without = str(save(tmp_path / "without.parquet").rename(tmp_path / "w.parquet"))
    with pytest.raises(DataError, match=r"^\S*w\.parquet: it has no column 'id', but text; name"):
        open_source([one, without], column="id")


def test_what_went_wrong_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "d" / "a.parquet", ["text of a line\n" * 9] * 999)
    data = bytearray(path.read_bytes())
    data[50:200] = bytes(range(150))
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot load its split 'train': (?!An error occurred)"):
        open_source(str(tmp_path / "d"))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for name in (tmp_path / "d", path):
        with pytest.raises(DataError, match=r"^\S*a\.parquet: a git-lfs pointer, not the file"):
            open_source(str(name))
    save(tmp_path / "e" / "a.parquet", id=list(range(20)))
    save(tmp_path / "e" / "b.parquet", other=list(range(20)))
    told = r"Couldn't cast \.\.\. because column names don't match$"
    with pytest.raises(DataError, match=told):
        open_source(str(tmp_path / "e"))


def test_an_entry_of_the_cache_is_known_by_what_was_read(tmp_path: Path) -> None:
    path = str(save(tmp_path / "d" / "a.parquet"))
    first, again = open_source(path).identity(), open_source(path).identity()
    save(Path(path), TEXTS[::-1])
    assert first == again != open_source(path).identity()


def test_conversations_come_as_they_are_in_jsonl(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": each}] for each in TEXTS]
    table = save(tmp_path / "a.parquet", messages=messages, unused=TEXTS)
    assert rows(str(table), column=None) == [{"messages": each} for each in messages]
    plain = write_jsonl(tmp_path / "a.jsonl", messages, "messages")
    assert open_source(str(plain), column=None).num_bytes == plain.stat().st_size


def test_quiet_is_quiet(tmp_path: Path, tokenizer_folder: Path) -> None:
    """`datasets` draws bars of its own."""
    folder = save(tmp_path / "tables" / "a.parquet").parent
    command = ("-m", "nanotron_fast", "tokenize", folder, tmp_path / "tokens", "--quiet")
    ran = subprocess.run(
        [sys.executable, *command, "--tokenizer", tokenizer_folder],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )
    assert (ran.stdout, ran.stderr) == ("", "")
