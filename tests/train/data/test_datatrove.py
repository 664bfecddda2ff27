"""datatrove writes the same files from the same text, and its reader sees what ours does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanotron_fast.train.data.nanoset import TokenFolder
from nanotron_fast.train.data.tokenize import tokenize
from tests.train.data.material import TEXT

pytest.importorskip("datatrove", reason="not installed: its own files are not compared")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    folder = tmp_path / "texts"
    folder.mkdir()
    with (folder / "a.jsonl").open("w") as stream:
        for _ in range(300):
            text = (TEXT * 5)[: int(random.integers(3, 300))]
            stream.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.mark.parametrize("eos", [True, False])
def test_files_are_the_same(texts: Path, tmp_path: Path, tokenizer_folder: Path, eos: bool) -> None:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    tokenize(str(texts), tmp_path / "ours", tokenizer=str(tokenizer_folder), workers=1, eos=eos)
    writer = DocumentTokenizer(
        output_folder=str(tmp_path / "theirs"),
        tokenizer_name_or_path=str(tokenizer_folder / "tokenizer.json"),
        eos_token="</s>" if eos else None,
        shuffle_documents=False,
    )
    pipeline = [JsonlReader(str(texts)), writer]
    LocalPipelineExecutor(pipeline=pipeline, tasks=1, logging_dir=str(tmp_path / "logs")).run()
    for suffix in ("ds", "ds.index"):
        [ours], [theirs] = (list((tmp_path / w).glob(f"*.{suffix}")) for w in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    metadata = [
        next((tmp_path / w).glob("*.metadata")).read_text().splitlines() for w in ("ours", "theirs")
    ]
    assert metadata[0][1:] == metadata[1][1:]
    assert metadata[0][0].endswith("|2")


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "seed": 6}], ids=str)
@pytest.mark.parametrize("eos", [None, 1])
def test_its_reader_sees_the_same_samples(
    texts: Path, tmp_path: Path, tokenizer_folder: Path, options: dict[str, Any], eos: int | None
) -> None:
    from datatrove.utils.dataset import DatatroveFolderDataset

    out = tmp_path / "ours"
    tokenize(str(texts), out, tokenizer=str(tokenizer_folder), workers=1, max_tokens_per_file=2000)
    theirs = DatatroveFolderDataset(
        str(out),
        32,
        filename_pattern="*.ds",
        recursive=False,
        return_positions=True,
        positions_from_eos_token_id=eos,
        **options,
    )
    seed = options.get("seed")
    ours = TokenFolder(out, 32, has_positions=True, eos_token_id=eos, shuffle_seed=seed)
    assert len(ours) == len(theirs)
    for index in range(len(ours)):
        one, other = ours[index], theirs[index]
        assert one.tokens.tolist() == other["input_ids"].tolist()
        assert one.positions is not None
        assert one.positions.tolist() == other["positions"].tolist()
