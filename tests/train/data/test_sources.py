"""What names stand for, found before anything is read; what cannot be read is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.nanoset import TokenFolder
from nanotron_fast.train.sources import find_files, find_tables
from tests.ordinary_user import ordinary_user
from tests.train.data.material import write_tokens


def written(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


def found_in(root: Path, name: str = "") -> list[str]:
    found = find_files(root / name)
    assert found is not None
    return [str(path.relative_to(root)) for path in found]


def test_finding_files(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("b.txt", "a.jsonl", "below/c.txt", "d.md", ".hidden.txt"):
        (tmp_path / name).write_text("{}")
    found = find_files(tmp_path)
    assert found is not None
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "a.jsonl",
        "b.txt",
        "below/c.txt",
    ]
    assert find_files(tmp_path / "b.txt") == (tmp_path / "b.txt",)
    assert find_files(tmp_path / "*.txt") == (tmp_path / "b.txt",)
    assert find_files(tmp_path / "**" / "*.txt") == (
        tmp_path / "b.txt",
        tmp_path / "below" / "c.txt",
    )
    assert find_files("HuggingFaceFW/fineweb") is None
    for name, message in {
        str(tmp_path / "e.txt"): r"e\.txt: there is no such file or folder",
        str(tmp_path / "nothing"): "nothing: there is no such file or folder",
        "some.jsonl": r"some\.jsonl: there is no such file",
        "~nobody-of-this-name/x": r"^~nobody-of-this-name/x: there is no such file or folder$",
        str(tmp_path / "*.nothing"): r"it matches no \.txt or \.jsonl file",
        str(tmp_path / "d.md"): r"d\.md: it is neither \.txt nor \.jsonl",
    }.items():
        with pytest.raises(DataError, match=message):
            find_files(name)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "x.parquet").write_text("")
    assert find_files(tmp_path / "tables") is None
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"empty: there is no \.txt or \.jsonl file in it"):
        find_files(empty)


def test_hidden_folders_are_passed_by_as_hidden_files_are(tmp_path: Path) -> None:
    written(tmp_path, "a.txt", ".git/b.txt", "c/.cache/d.txt", ".cache/e.parquet")
    assert found_in(tmp_path) == found_in(tmp_path, "**/*.txt") == ["a.txt"]
    # One that is named is meant.
    assert found_in(tmp_path, ".git") == [".git/b.txt"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    written(tmp_path, "texts/a.txt", "elsewhere/b.txt")
    (tmp_path / "texts" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "texts")
    assert found_in(tmp_path, "texts") == ["texts/a.txt", "texts/more/b.txt"]


def test_files_go_by_their_own_names_and_not_by_those_of_links(tmp_path: Path) -> None:
    """A link that is made later changes neither their order nor what tokens are known by."""
    written(tmp_path, "texts/b/x.txt", "texts/c/y.txt", "tables/b/x.parquet")
    for folder in ("texts", "tables"):
        (tmp_path / folder / "a").symlink_to("c" if folder == "texts" else "b")
    assert found_in(tmp_path, "texts") == ["texts/b/x.txt", "texts/c/y.txt"]
    # `datasets` leaves nothing out.
    assert find_files(tmp_path / "tables") is None


@pytest.mark.parametrize("name", ["", "*/*.txt", "**/*.txt", "**"])
def test_order_is_by_folders_and_not_by_characters(name: str, tmp_path: Path) -> None:
    """A hyphen and a space come before the slash; a run that goes on reads on in its order."""
    names = ["a/x.txt", "a b/x.txt", "a-b/x.txt"]
    written(tmp_path, *names)
    assert found_in(tmp_path, name) == names


@pytest.mark.parametrize("name", ["", "**/*.txt", "*/*.txt", "*/a/x.txt", "*/**"])
def test_a_folder_that_may_not_be_read_is_refused(name: str, tmp_path: Path) -> None:
    """Without it a run would be trained on less than was meant."""
    written(tmp_path, "one/a/x.txt", "one/y.txt", "two/a/x.txt", "two/y.txt")
    locked = tmp_path / "two"
    locked.chmod(0)
    try:
        with (
            ordinary_user(),
            pytest.raises(DataError, match=f"^{locked}: it may not be read.*: Permission denied"),
        ):
            find_files(tmp_path / name)
    finally:
        locked.chmod(0o755)
    assert found_in(tmp_path, name)


@pytest.mark.parametrize("name", ["", "**/*.txt"])
def test_what_every_file_system_has_at_its_root_stops_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "a.txt", "b/c.txt")
    locked = tmp_path / "lost+found"
    locked.mkdir(mode=0)
    with ordinary_user():
        with pytest.raises(DataError, match="it may not be read"):
            find_files(tmp_path / name)
        monkeypatch.setattr(os.path, "ismount", tmp_path.__eq__)
        assert found_in(tmp_path, name) == ["a.txt", "b/c.txt"]


def test_files_that_datasets_reads(tmp_path: Path) -> None:
    written(tmp_path, "a.parquet", "b.parquet", "c/d.csv.gz", "e.txt")
    assert find_files(tmp_path / "a.parquet") is None
    assert find_tables(str(tmp_path / "a.parquet")) == (tmp_path / "a.parquet",)
    assert find_files(tmp_path / "*.parquet") is None
    assert find_tables(str(tmp_path / "*.parquet")) == (
        tmp_path / "a.parquet",
        tmp_path / "b.parquet",
    )
    # Of a folder they are for `datasets` to find, by splits.
    assert find_files(tmp_path / "c") is None
    assert find_tables(str(tmp_path / "c")) == find_tables("owner/name") == ()
    with pytest.raises(DataError, match=r"matches .*e\.txt, and files that `datasets` reads"):
        find_files(tmp_path / "*")
    written(tmp_path, "b.json.parquet")
    assert find_files(tmp_path / "*.parquet") is None
    (tmp_path / "e.txt").unlink()
    written(tmp_path, "b.gz")
    with pytest.raises(DataError, match=r"\*: it matches \.gz and \.parquet files"):
        find_files(tmp_path / "*")
    os.rename(tmp_path / "b.gz", tmp_path / "f.csv.gz")
    with pytest.raises(DataError, match=r"\*: it matches \.csv and \.parquet files, and `data"):
        find_files(tmp_path / "*")


@pytest.mark.parametrize(
    "names",
    [
        ("a.parquet", "LICENSE.txt"),
        ("a.parquet", "config.json"),
        ("a.jsonl.gz", "b.jsonl.gz", "LICENSE.txt"),
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "about.json"),
        ("a.json.parquet", "b.json.parquet"),
        ("a.jsonl", "b.json"),
    ],
)
def test_what_lies_beside_data_stops_nothing(names: tuple[str, ...], tmp_path: Path) -> None:
    written(tmp_path, *names)
    assert find_files(tmp_path) is None


def test_what_datasets_would_leave_out_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "x/a.parquet", "x/b.parquet", "x/LICENSE.txt", "x/dataset_infos.json")
    assert find_files(tmp_path / "x") is None
    written(tmp_path, "x/sub/c.jsonl.gz")
    told = r"x: it has \.json and \.parquet files, of which `datasets` reads one kind alone"
    with pytest.raises(DataError, match=told):
        find_files(tmp_path / "x")
    # A README may say which are data.
    written(tmp_path, "x/README.md")
    assert find_files(tmp_path / "x") is None
    written(tmp_path, "y/a.txt", "y/stats.csv")
    with pytest.raises(DataError, match=r"y: it has \.csv and \.txt files"):
        find_files(tmp_path / "y")
    # A table whose columns are parted by tabs is read as one of one column beside those.
    written(tmp_path, "w/a.csv", "w/b.tsv")
    with pytest.raises(DataError, match=r"w: it has \.csv and \.tsv files"):
        find_files(tmp_path / "w")
    written(tmp_path, "z/a.parquet", "far/deep/b.parquet")
    (tmp_path / "z" / "link").symlink_to(tmp_path / "far")
    with pytest.raises(DataError, match=r"z/link: it is a link to a folder, into which"):
        find_files(tmp_path / "z")


def test_a_nanoset_that_may_not_be_read_is_not_called_empty(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", "a.ds", [[1] * 40])
    (tmp_path / "tokens").chmod(0)
    try:
        with (
            ordinary_user(),
            pytest.raises(DataError, match=f"^{tmp_path / 'tokens'}: Permission denied$"),
        ):
            TokenFolder(tmp_path / "tokens", 16)
    finally:
        (tmp_path / "tokens").chmod(0o755)
    assert len(TokenFolder(tmp_path / "tokens", 16)) == 2


@pytest.mark.parametrize("archive", ["old.tar.gz", "old.tar.xz", "old.bz2"])
def test_what_is_packed_and_no_data_changes_nothing(tmp_path: Path, archive: str) -> None:
    """`datasets` cannot read it, and would take each line of the texts for a document."""
    written(tmp_path, "a.txt", "b.jsonl", archive)
    assert found_in(tmp_path) == ["a.txt", "b.jsonl"]
