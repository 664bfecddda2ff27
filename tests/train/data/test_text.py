"""Text becomes windows of tokens, once, whatever makes them."""

from __future__ import annotations

import errno
import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanotron_fast.errors import CheckpointError, DataError, MissingPackageError
from nanotron_fast.train.data import tokenizer as tokenizers_of_ours
from nanotron_fast.train.data.cache import CachedTokens, cached_tokens
from nanotron_fast.train.data.encode import TextRecipe
from nanotron_fast.train.data.text import DatasetRows, Source, open_source, row_groups
from nanotron_fast.train.data.tokenizer import (
    check_vocabulary,
    fingerprint,
    load_tokenizer,
    recipe,
    token_size,
)
from nanotron_fast.train.data.windows import TextWindows
from nanotron_fast.train.data.worker import encode
from tests.ordinary_user import ordinary_user
from tests.train.data.material import TEXT, make_tokenizer
from tests.train.data.nanotron_order import clm_windows, positions_from_ends
from tests.train.full_disk import no_file_beyond


def tokens_of(source: Source, tokenizer: Any, **options: Any) -> CachedTokens:
    return cached_tokens(
        source,
        TextRecipe(recipe(tokenizer)),
        recipe_identity=fingerprint(tokenizer),
        token_size=2,
        **options,
    )


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


@dataclass
class Table:
    """What is used of a datasets.Dataset."""

    columns: dict[str, list[Any]]
    _fingerprint: str = "one"
    read: list[slice] = field(default_factory=list)

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    @property
    def data(self) -> Any:
        return SimpleNamespace(nbytes=1000, num_rows=len(self))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: slice) -> dict[str, list[Any]]:
        self.read.append(index)
        return {name: values[index] for name, values in self.columns.items()}


def test_files_are_joined_and_windows_overlap_by_one(tmp_path: Path, tokenizer: Any) -> None:
    texts = [TEXT * 3, "a", "", TEXT + "b" * 50]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    text = tokens_of(open_source(str(tmp_path)), tokenizer)
    ids = [tokenizer(each)["input_ids"] for each in texts]
    joined = [token for each in ids for token in each]
    ends = np.cumsum([len(each) for each in ids]).tolist()
    samples = TextWindows(text, 16, has_positions=True)
    assert len(samples) == (len(joined) - 1) // 16
    for i in range(len(samples)):
        sample = samples[i]
        assert sample.tokens.tolist() == joined[i * 16 : i * 16 + 17]
        assert sample.positions is not None
        assert sample.positions.tolist() == positions_from_ends(ends, i * 16, 17)
    assert samples[len(samples)].tokens.tolist() == joined[:17]
    with pytest.raises(DataError, match=rf"{len(joined)} tokens are too few for a sample of 1,001"):
        TextWindows(text, 1000)


@pytest.mark.parametrize(("rows", "processes"), [(2500, 1), (2500, 3), (7, 16), (1000, 1)])
def test_datasets_are_joined_in_the_groups_of_nanotron(
    tokenizer: Any, rows: int, processes: int
) -> None:
    random = np.random.default_rng(rows)
    texts = ["x" * int(size) for size in random.integers(0, 9, rows)]
    table = Table({"id": list(range(rows)), "text": texts}, f"{rows} {processes}")
    text = tokens_of(DatasetRows("table", table, "text", processes), tokenizer)
    ids = tokenizer(texts)["input_ids"]
    expected = clm_windows(ids, 8, processes)
    if not expected:
        with pytest.raises(DataError, match="too few"):
            TextWindows(text, 8)
        return
    samples = TextWindows(text, 8)
    assert [samples[i].tokens.tolist() for i in range(len(samples))] == expected
    assert max(each.stop - each.start for each in table.read) <= 1000


def test_groups_are_those_of_dataset_map() -> None:
    assert list(row_groups(2500, 1)) == [(0, 1000), (1000, 2000), (2000, 2500)]
    assert list(row_groups(5, 3)) == [(0, 2), (2, 4), (4, 5)]
    assert list(row_groups(0, 3)) == []


def test_special_tokens_are_those_of_the_tokenizer(
    tmp_path: Path, bos_tokenizer_folder: Path
) -> None:
    tokenizer = load_tokenizer(bos_tokenizer_folder)
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "", "two three"])
    text = tokens_of(open_source(str(path)), tokenizer)
    expected = [
        token for each in ("one", "", "two three") for token in tokenizer(each)["input_ids"]
    ]
    assert expected.count(0) == 3
    assert text.tokens.tolist() == expected
    assert text.num_documents == 3


def test_a_long_document_is_read_in_pieces(
    tmp_path: Path, bos_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(bos_tokenizer_folder)
    long = "\ufeff" + (TEXT + "  indented\n\n") * 40
    short = "short"
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.txt").write_text(short)
    write_jsonl(tmp_path / "c.jsonl", [long[1:]])
    expected = [
        *tokenizer(long[1:])["input_ids"],
        *tokenizer(short)["input_ids"],
        *tokenizer(long[1:])["input_ids"],
    ]
    from nanotron_fast.train.data import text as text_module

    monkeypatch.setattr(text_module, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(text_module, "MAX_CHARACTERS", 200)
    monkeypatch.setattr(tokenizers_of_ours, "MAX_CHARACTERS", 200)
    assert len(tokenizers_of_ours.split(long)) > 15
    text = tokens_of(open_source(str(tmp_path)), tokenizer)
    assert text.tokens.tolist() == expected
    ends = np.cumsum([len(tokenizer(each)["input_ids"]) for each in (long[1:], short, long[1:])])
    assert text.ends.tolist() == ends.tolist()


def test_a_text_without_lines_or_spaces_is_cut_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizers_of_ours, "MAX_CHARACTERS", 10)
    for text in ("x" * 35, "\n" * 35, " " * 35, "ab cd\n" * 9, "日" * 11):
        pieces = tokenizers_of_ours.split(text)
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 10
    assert tokenizers_of_ours.split("aaaa bbbb cccc") == ["aaaa bbbb", " cccc"]
    assert tokenizers_of_ours.split("aaaaaa\nbbbb cccc") == ["aaaaaa\n", "bbbb cccc"]


def test_several_processes_make_the_same_tokens(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanotron_fast.train.data import text as text_module

    monkeypatch.setattr(text_module, "_BLOCK_BYTES", 1000)
    texts = [TEXT * (1 + number % 7) for number in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    source = open_source(str(path))
    assert sum(1 for _ in source.blocks()) > 10
    here = list(encode(source.blocks(), TextRecipe(recipe(tokenizer)), 1))
    # An error comes from there as it would from here, after all that precedes it.
    with path.open("a") as stream:
        stream.write(" " * 2000 + '{"text": 5}\n')
    there = encode(source.blocks(), TextRecipe(recipe(tokenizer)), 2)
    for one in here:
        other = next(there)
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.ends.tolist() == other.ends.tolist()
    with pytest.raises(DataError, match=r"a\.jsonl, line 61: its 'text' is 5"):
        list(there)


class Counting:
    """A source that says how often it was read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def blocks(self) -> Iterator[Any]:
        self.reads += 1
        return self.source.blocks()


def test_tokens_are_made_once(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    source = Counting(open_source(str(path)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tokens_of(source, tokenizer), range(8)))
    assert source.reads == 1
    assert len({each.path for each in found}) == 1
    assert Path(found[0].path).is_relative_to(cache)
    tokens_of(source, tokenizer, overwrite=True)
    assert source.reads == 2
    # Another text, another tokenizer: other tokens.
    path.write_text(TEXT * 2)
    source = Counting(open_source(str(path)))
    assert tokens_of(source, tokenizer).num_tokens > found[0].num_tokens
    other = load_tokenizer(make_tokenizer(tmp_path / "other", vocab_size=270))
    tokens_of(source, other)
    assert source.reads == 2
    assert not [each.name for each in (cache / "tokens").iterdir() if "partial" in each.name]


def test_an_error_leaves_nothing_in_the_cache(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["fine"] * 3)
    with path.open("a") as stream:
        stream.write('{"no text": "here"}\n')
    source = open_source(str(path))
    with pytest.raises(DataError, match=r"line 4: it has no key 'text'; its keys: no text"):
        tokens_of(source, tokenizer)
    assert [each for each in (cache / "tokens").iterdir() if each.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_said_to_be_one(
    tmp_path: Path, tokenizer: Any, cache: Path
) -> None:
    """As in a home of which nothing is left, or that may only be read."""
    path = tmp_path / "a.txt"
    path.write_text(TEXT * 100)
    source = open_source(str(path))
    way_out = "NANOTRON_FAST_CACHE names another folder"
    with (
        no_file_beyond(1000),
        pytest.raises(
            DataError,
            match=rf"^{cache}: the tokens of .*a\.txt are kept there, and cannot be: "
            rf"File too large: .*/tokens\.ds; {way_out}$",
        ),
    ):
        tokens_of(source, tokenizer)
    assert [each for each in (cache / "tokens").iterdir() if each.is_dir()] == []
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    with (
        ordinary_user(),
        pytest.raises(DataError, match=rf"Permission denied: {home}/\.cache; {way_out}$"),
    ):
        tokens_of(source, tokenizer, folder=home / ".cache" / "nanotron_fast")
    # What it has already is read all the same.
    tokens = tokens_of(source, tokenizer)
    (cache / "tokens").chmod(0o500)
    with ordinary_user():
        assert tokens_of(source, tokenizer) == tokens
    # What else cannot be read is no fault of the cache's.
    path.write_text(TEXT * 101)
    source = open_source(str(path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.txt"):
        tokens_of(source, tokenizer)


def test_ranks_without_locks_do_not_harm_each_other(
    tmp_path: Path, tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Lustre without flock: both make the tokens, and the first to be done has the name."""
    from nanotron_fast.train.data import writing

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(writing.fcntl, "flock", no_locks)
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    source = open_source(str(path))
    monkeypatch.setattr(writing.os, "getpid", lambda: threading.get_ident())
    both = threading.Barrier(2)

    class Together(Counting):
        def blocks(self) -> Iterator[Any]:
            both.wait(60)
            return super().blocks()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: tokens_of(Together(source), tokenizer), range(2)))
    assert found[0].tokens.tolist() == tokenizer(TEXT)["input_ids"]
    assert found[0] == found[1]
    assert len([each for each in (cache / "tokens").iterdir() if each.is_dir()]) == 1


def test_what_a_killed_process_left_is_in_nobodys_way(
    tmp_path: Path, tokenizer: Any, cache: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    source = open_source(str(path))
    entry = Path(tokens_of(source, tokenizer).path).parent
    partial = entry.rename(entry.with_name(f"{entry.name}.there-1.partial"))
    (partial / "junk").write_text("left")
    again = tokens_of(source, tokenizer)
    assert not partial.exists()
    assert sorted(each.name for each in Path(again.path).parent.iterdir()) == [
        "about.json",
        "groups",
        "tokens.ds",
        "tokens.ds.index",
    ]
    Path(again.path).write_bytes(b"x")
    with pytest.raises(DataError, match=r"not as long as its about\.json says; delete it"):
        tokens_of(source, tokenizer)


BAD_JSON = {
    "{": r"bad\.jsonl, line 2: it is not JSON",
    "[1]": r"bad\.jsonl, line 2: a list, and not an object",
    '{"text": null}': r"bad\.jsonl, line 2: its 'text' is None, and not text",
    r'{"text": "a\ud800"}': r"bad\.jsonl, line 2: '\\ud800' is half of a surrogate pair",
}


@pytest.mark.parametrize("line", BAD_JSON)
def test_bad_json_is_named(tmp_path: Path, tokenizer: Any, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n\n')
    with pytest.raises(DataError, match=BAD_JSON[line]):
        tokens_of(open_source(str(path)), tokenizer)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_was_not_downloaded_is_no_text(tmp_path: Path, name: str) -> None:
    """In a clone without git-lfs a few lines stand for each file."""
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataError, match=rf"^{tmp_path}/a\.\w+: a git-lfs pointer, not the file"):
        list(open_source(str(tmp_path)).blocks())


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes("ä".encode() * 700_000 + b"\xff" + b"rest")
    with pytest.raises(DataError, match=r"bad\.txt: it is not UTF-8: byte 1,400,000 is 0xff"):
        tokens_of(open_source(str(path)), tokenizer)
    path.write_bytes(b"cut \xc3")
    with pytest.raises(DataError, match="byte 4 is 0xc3"):
        tokens_of(open_source(str(path)), tokenizer)


def test_files_do_not_mix_with_datasets(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    path = str(tmp_path / "a.txt")
    for names in ([path, "owner/dataset"], {path: 0.5}):
        with pytest.raises(DataError, match="cannot be mixed"):
            open_source(names)
    with pytest.raises(DataError, match="empty"):
        open_source([])
    source = open_source([path, path])
    assert source.name == f"{path}, {path}"
    assert source.num_bytes == 2


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    pip = r"pip install 'nanotron_fast\[train\]'"
    needs = rf"needs datasets, not installed here: {pip}"
    with pytest.raises(
        MissingPackageError,
        match=rf"^owner/data: there is no such file or folder; as a dataset of the Hub it {needs}",
    ):
        open_source("owner/data")
    (tmp_path / "a.parquet").touch()
    with pytest.raises(MissingPackageError, match=rf"^{tmp_path}: as a dataset it {needs}"):
        open_source(str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=f"tokenizer needs transformers.*{pip}"):
        load_tokenizer(tmp_path)


def test_tokenizers_that_are_not_there_or_too_large(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(CheckpointError, match="nothing: no such directory"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(DataError, match="s3://bucket/a: it is read from a folder or the Hub, not"):
        load_tokenizer("s3://bucket/a")
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(CheckpointError, match=r"a\.txt: not a directory"):
        load_tokenizer(tmp_path / "a.txt")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: there is no tokenizer in it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: its tokenizer cannot be loaded: "):
        load_tokenizer(tmp_path)
    size = len(tokenizer)
    check_vocabulary(tokenizer, size)
    with pytest.raises(DataError, match=rf"vocabulary is {size}, and the model's is {size - 1}"):
        check_vocabulary(tokenizer, size - 1)
    assert (token_size(65536), token_size(65537)) == (2, 4)


def test_a_tokenizer_of_the_hub_is_asked_for_once(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str | None] = []

    def fetch(hub_id: str, revision: str | None = None, **patterns: Any) -> str:
        asked.append(revision)
        if hub_id != "org/name":
            raise ConnectionError("Name or service not known")
        return str(tokenizer_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    loaded = load_tokenizer("org/name", revision="v1")
    # What transformers asks for below the first level is of the same revision.
    assert asked == ["v1", tokenizer_folder.name]
    assert loaded.name_or_path == "org/name"
    # A folder's name with a slip in it is one, too.
    with pytest.raises(CheckpointError, match="nope: no such directory, and it cannot be had from"):
        load_tokenizer("nope")
    assert asked[2:] == [None]


def test_a_value_that_is_no_text_is_named_and_not_shown_whole(tokenizer: Any) -> None:
    table = Table({"text": ["a"] * 1500 + [["long"] * 10_000]})
    with pytest.raises(
        DataError, match=r"^table, row 1,500 \(from 0\): its text is .*not text$"
    ) as e:
        tokens_of(DatasetRows("table", table, "text"), tokenizer)
    assert len(str(e.value)) < 200


def test_columns_that_are_not_there() -> None:
    with pytest.raises(DataError, match=r"table: it has no column 'text', but body, id"):
        DatasetRows("table", Table({"body": ["a"], "id": [1]}), "text")
