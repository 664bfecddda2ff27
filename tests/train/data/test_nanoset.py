"""Token files on disk are read as datatrove and Nanotron read them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.nanoset import TokenFolder
from tests.train.data.material import write_tokens
from tests.train.data.nanotron_order import folder_samples, positions, positions_from_ends

EOS = 1


def documents(seed: int, count: int, most: int, vocab: int = 500) -> list[list[int]]:
    """Random documents, each with EOS at its end and nowhere else."""
    random = np.random.default_rng(seed)
    return [
        [*random.integers(2, vocab, random.integers(0, most)).tolist(), EOS] for _ in range(count)
    ]


def make_folder(folder: Path, *, size: int = 2, files: int = 5) -> Path:
    for number in range(files):
        # Names whose order is not that of the numbers.
        write_tokens(
            folder,
            f"{'abcde'[number % 5]}_{10 - number}.ds",
            documents(number, 20 + 7 * number, 30, 500 if size == 2 else 100_000),
            size=size,
        )
    return folder


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shuffle_seed", [None, 6, 42])
def test_samples_are_those_of_datatrove(
    tmp_path: Path, size: int, shuffle_seed: int | None
) -> None:
    folder = make_folder(tmp_path / "tokens", size=size)
    expected = folder_samples(folder, 16, size=size, shuffle_seed=shuffle_seed)
    samples = TokenFolder(folder, 16, shuffle_seed=shuffle_seed)
    assert len(samples) == len(expected)
    assert [samples[i].tokens.tolist() for i in range(len(samples))] == expected
    assert samples[0].tokens.dtype == np.int64
    assert samples[0].positions is None
    # Past the end it begins again.
    assert samples[len(samples) * 3 + 2].tokens.tolist() == expected[2]


def test_positions_by_the_end_token_and_by_the_index(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    found = documents(0, 40, 12)
    write_tokens(folder, "a.ds", found)
    ends = np.cumsum([len(document) for document in found]).tolist()
    by_token = TokenFolder(folder, 16, has_positions=True, eos_token_id=EOS)
    by_index = TokenFolder(folder, 16, has_positions=True)
    for i in range(len(by_token)):
        one, other = by_token[i], by_index[i]
        assert one.positions is not None
        assert other.positions is not None
        assert one.positions.tolist() == positions(one.tokens.tolist(), EOS)
        assert other.positions.tolist() == positions_from_ends(ends, i * 17, 17)
        # Both say the same, since every document has its end token.
        assert one.positions.tolist() == other.positions.tolist()


def test_a_part_of_the_tokens(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tokens")
    everything = folder_samples(folder, 16, size=2)
    first = len(np.fromfile(folder / "a_10.ds", dtype=np.uint16)) // 17
    limited = TokenFolder(folder, 16, max_tokens=17 * (first + 3) + 5)
    assert len(limited) == first + 3
    assert [limited[i].tokens.tolist() for i in range(len(limited))] == everything[: first + 3]


def test_copies_are_read_instead(tmp_path: Path) -> None:
    folder, copies = make_folder(tmp_path / "tokens"), tmp_path / "copies"
    copies.mkdir()
    path = folder / "a_10.ds"
    changed = np.fromfile(path, dtype=np.uint16) + np.uint16(1000)
    changed.tofile(copies / path.name)
    samples = TokenFolder(folder, 16, read_path=copies)
    assert samples[0].tokens.min() >= 1000
    assert samples[len(samples) - 1].tokens.max() < 1000
    assert str(copies / path.name) in samples.place(0)
    with pytest.raises(DataError, match=r"s3://bucket/tokens: .*dataset_read_path"):
        TokenFolder("s3://bucket/tokens", 16)


def test_many_more_files_than_may_be_open(tmp_path: Path) -> None:
    import resource

    folder = tmp_path / "tokens"
    for number in range(300):
        write_tokens(folder, f"{number:03d}.ds", [[number] * 5], metadata=number == 0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        samples = TokenFolder(folder, 4)
        assert [int(samples[i].tokens[0]) for i in range(300)] == list(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    with pytest.raises(DataError, match=r"tokens: there is no such folder"):
        TokenFolder(folder, 16)
    folder.mkdir()
    with pytest.raises(DataError, match=r"tokens: there is no \.ds file in it"):
        TokenFolder(folder, 16)
    write_tokens(folder, "a.ds", [[5] * 40], metadata=False)
    with pytest.raises(DataError, match=r"no \.metadata file .*token_size_in_bytes"):
        TokenFolder(folder, 16)
    assert len(TokenFolder(folder, 16, token_size=2)) == 2
    with pytest.raises(DataError, match=r"tokens: its 1 \.ds files have no 50 tokens"):
        TokenFolder(folder, 49, token_size=2)
    with pytest.raises(DataError, match=r"a\.ds: it is a file; name its folder"):
        TokenFolder(folder / "a.ds", 16)
    (folder / "a.ds.metadata").write_text("t|4\n40\n40 T")
    with pytest.raises(DataError, match="tokens of 4 bytes, and token_size_in_bytes is 2"):
        TokenFolder(folder, 16, token_size=2)
    (folder / "b.ds.metadata").write_text("t|2\n40\n40 T")
    with pytest.raises(DataError, match=r"b\.ds\.metadata: .* others beside it have 4"):
        TokenFolder(folder, 16)
    (folder / "a.ds.metadata").write_text("t|3\n40\n40 T")
    with pytest.raises(DataError, match=r"a\.ds\.metadata: tokens of '3' bytes; there are 2 and 4"):
        TokenFolder(folder, 16)


def test_files_that_are_cut_short(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    write_tokens(folder, "a.ds", [[5] * 40])
    index = folder / "a.ds.index"
    whole = index.read_bytes()
    index.write_bytes(whole[:3])
    TokenFolder(folder, 16)
    with pytest.raises(DataError, match=r"a\.ds\.index: it ends at token 0, and a\.ds at 40"):
        TokenFolder(folder, 16, has_positions=True)
    index.unlink()
    with pytest.raises(DataError, match=r"a\.ds\.index: there is no such file"):
        TokenFolder(folder, 16, has_positions=True)
    with (folder / "a.ds").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match=r"a\.ds: its 81 bytes are no whole number of tokens of 2"):
        TokenFolder(folder, 16)


def test_a_folder_that_was_made_anew_is_read_anew(tmp_path: Path) -> None:
    """By one process, as in a notebook: what was mapped before is of files that are gone."""
    for value in (1, 2):
        shutil.rmtree(tmp_path / "tokens", ignore_errors=True)
        write_tokens(tmp_path / "tokens", "a.ds", [[value] * 40])
        assert TokenFolder(tmp_path / "tokens", 16)[1].tokens.tolist() == [value] * 17
