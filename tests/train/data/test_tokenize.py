"""`nanotron-fast tokenize`: a Nanoset that is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from nanotron_fast.cli.commands import app
from nanotron_fast.train.data.nanoset import TokenFolder
from nanotron_fast.train.data.tokenize import in_words
from nanotron_fast.train.data.tokenizer import load_tokenizer
from tests.train.data.material import TEXT, make_tokenizer
from tests.train.full_disk import no_file_beyond


def run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["tokenize", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def write_texts(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


TEXTS = [TEXT * (1 + number % 5) for number in range(40)]


def test_files_are_those_that_datatrove_writes(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Any
) -> None:
    source, out = write_texts(tmp_path / "a.jsonl", TEXTS), tmp_path / "deep" / "out"
    words = run(source, out, "--tokenizer", tokenizer_folder, "--workers", 1).output
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    total = sum(map(len, ids))
    ends = np.cumsum([len(each) for each in ids])
    assert files_of(out) == {
        "00000_tokens.ds": np.array([t for each in ids for t in each], dtype="<u2").tobytes(),
        "00000_tokens.ds.index": ends.astype("<u8").tobytes(),
        "00000_tokens.ds.metadata": (f"{tokenizer_folder}|2\n{total}\n{in_words(total)}T".encode()),
    }
    assert f"{total:,} tokens of 40 documents in {out}, 2 bytes each" in words
    assert len(TokenFolder(out, 32, has_positions=True)) == total // 33
    assert [each.name for each in out.parent.iterdir()] == ["out"]


def test_what_a_person_sees(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000, 10**6, 7))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    (tmp_path / "a.txt").write_text("a" * 10_000)
    options = ("--tokenizer", tokenizer_folder, "--workers", 1)
    seen = run(tmp_path / "a.txt", tmp_path / "out", *options)
    # What is loaded first does not count.
    assert seen.stderr == "tokenizing: 10 kB of 10 kB, 1.43 kB/s\n"
    assert " tokens of 1 document in " in seen.stdout


def test_no_eos_has_the_tokenizers_own_special_tokens(
    tmp_path: Path, bos_tokenizer_folder: Path
) -> None:
    tokenizer = load_tokenizer(bos_tokenizer_folder)
    source = write_texts(tmp_path / "a.jsonl", ["one", "two"], column="body")
    options = ("--tokenizer", bos_tokenizer_folder, "--workers", 1, "--text-column", "body")
    run(source, tmp_path / "bare", *options, "--no-eos")
    tokens = np.fromfile(tmp_path / "bare" / "00000_tokens.ds", dtype="<u2").tolist()
    assert tokens == [*tokenizer("one")["input_ids"], *tokenizer("two")["input_ids"]]
    assert tokens.count(tokenizer.bos_token_id) == 2
    # With it, as in datatrove, nothing but the end.
    run(source, tmp_path / "ended", *options)
    tokens = np.fromfile(tmp_path / "ended" / "00000_tokens.ds", dtype="<u2").tolist()
    assert tokens.count(tokenizer.bos_token_id) == 0
    assert tokens.count(tokenizer.eos_token_id) == 2


def test_workers_and_json(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanotron_fast.train.data import text as text_module

    monkeypatch.setattr(text_module, "_BLOCK_BYTES", 1000)
    source = write_texts(tmp_path / "a.jsonl", TEXTS)
    options = ("--tokenizer", tokenizer_folder, "--max-tokens-per-file", 500, "--json")
    reports = [
        json.loads(run(source, tmp_path / str(workers), *options, "--workers", workers).stdout)
        for workers in (1, 2)
    ]
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert len(reports[0]["files"]) > 3
    assert reports[0]["files"][:2] == ["00000_tokens.ds", "00001_tokens.ds"]
    assert reports[0]["documents"] == 40
    assert reports[0]["token_size"] == 2
    sizes = [(tmp_path / "1" / name).stat().st_size // 2 for name in reports[0]["files"]]
    assert sum(sizes) == reports[0]["tokens"]
    assert min(sizes[:-1]) >= 500


def test_a_long_document_stays_in_one_file(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanotron_fast.train.data import text as text_module
    from nanotron_fast.train.data import tokenizer as tokenizer_module

    monkeypatch.setattr(text_module, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(text_module, "MAX_CHARACTERS", 200)
    monkeypatch.setattr(tokenizer_module, "MAX_CHARACTERS", 200)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(TEXT * 20)
    options = ("--tokenizer", tokenizer_folder, "--workers", 1, "--max-tokens-per-file", 5)
    run(folder, tmp_path / "out", *options, "--quiet")
    for number in range(3):
        path = tmp_path / "out" / f"0000{number}_tokens.ds"
        tokens = np.fromfile(path, dtype="<u2")
        assert tokens.tolist().count(1) == 1
        assert np.fromfile(f"{path}.index", dtype="<u8").tolist() == [len(tokens)]


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "large")
    described = json.loads((folder / "tokenizer.json").read_text())
    described["added_tokens"].append(
        {
            **described["added_tokens"][0],
            "id": 70_000,
            "content": "<far>",
        }
    )
    (folder / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = load_tokenizer(folder)
    far = tokenizer("<far>")["input_ids"]
    source = write_texts(tmp_path / "a.jsonl", ["<far>"])
    run(source, tmp_path / "out", "--tokenizer", folder, "--workers", 1)
    size = 4 if max(far) >= 2**16 else 2
    tokens = np.fromfile(tmp_path / "out" / "00000_tokens.ds", dtype=f"<u{size}")
    assert tokens.tolist() == [*far, tokenizer.eos_token_id]


def test_bad_input_ends_with_2_and_leaves_nothing(tmp_path: Path, tokenizer_folder: Path) -> None:
    out = tmp_path / "below" / "out"
    source = write_texts(tmp_path / "a.jsonl", TEXTS)
    with source.open("a") as stream:
        stream.write("{\n")
    options = ("--tokenizer", tokenizer_folder, "--workers", 1)

    def error(*words: object) -> str:
        message = run(*words, code=2).stderr
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert not out.exists()
        assert not list(tmp_path.rglob("*.partial"))
        return message

    assert "a.jsonl, line 41: it is not JSON" in error(source, out, *options)
    assert "nothing.txt: there is no such file" in error(tmp_path / "nothing.txt", out, *options)
    assert "it has no key 'body'" in error(source, out, *options, "--text-column", "body")
    nowhere = ("--tokenizer", tmp_path / "nowhere", "--workers", 1)
    assert "nowhere: no such directory" in error(source, out, *nowhere)
    for name, nothing in (("a.jsonl", "\n"), ("b.jsonl", '{"text": ""}\n' * 3), ("c.txt", "")):
        empty = tmp_path / name
        empty.write_text(nothing)
        for more in ((), ("--no-eos",)):
            assert f"{name}: there is no text in it" in error(empty, out, *options, *more)
    (tmp_path / "d.txt").write_text(TEXT)
    for more in (("--split", "test"), ("--config-name", "en")):
        said = error(tmp_path / "d.txt", out, *options, *more)
        assert f"d.txt: these are files, and '{more[1]}' is of a dataset" in said
    out.mkdir(parents=True)
    (out / "mine").write_text("mine")
    assert "out: it is not empty" in run(source, out, *options, code=2).stderr
    assert [each.name for each in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("texts", [TEXTS[:10], TEXTS * 40])
def test_a_full_disk_names_the_file_and_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, texts: list[str]
) -> None:
    # What fails is the last write, of what was in memory still, or an earlier one.
    source = write_texts(tmp_path / "a.jsonl", texts)
    out = tmp_path / "out"
    options = ("--tokenizer", tokenizer_folder, "--workers", 1, "--quiet")
    with no_file_beyond(1000):
        result = run(source, out, *options, code=2)
    place, _, reason = result.stderr.rpartition(": ")
    assert place.startswith(f"error: {out}.")
    assert place.endswith(".partial/00000_tokens.ds")
    assert reason == "File too large\n"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl"]


def test_two_at_once_do_not_write_the_same_folder(tmp_path: Path, tokenizer_folder: Path) -> None:
    from nanotron_fast.train.data.writing import whole_folder

    source = write_texts(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    with whole_folder(out) as partial:
        (partial / "first").write_text("first")
        result = run(source, out, "--tokenizer", tokenizer_folder, "--workers", 1, code=2)
        assert "another process is writing it" in result.stderr
    assert [each.name for each in out.iterdir()] == ["first"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 "), (999, "999 "), (1000, "1.00 k"), (12_345, "12.3 k"), (999_999, "1.00 M")],
)
def test_counts_in_words(number: int, words: str) -> None:
    assert in_words(number) == words
