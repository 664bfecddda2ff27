"""What Nanotron does with samples, written down again from its source: the oracle of these tests.

Nanotron 2411b022: nemo_dataset/helpers.cpp, samplers.py, clm_collator.py and processing.py in
src/nanotron/data; datatrove 0.10: utils/dataset.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np


def blend(weights: Sequence[float], size: int) -> tuple[list[int], list[int]]:
    """build_blending_indices: the source of each sample, and its place there."""
    normalised = np.array(weights, dtype=np.float64)
    normalised /= np.sum(normalised)
    shares = [float(each) for each in normalised]
    taken = [0] * len(shares)
    sources, places = [], []
    for i in range(size):
        x = max(float(i), 1.0)
        errors = [share * x - float(count) for share, count in zip(shares, taken, strict=True)]
        chosen = max(range(len(errors)), key=lambda source: (errors[source], -source))
        sources.append(chosen)
        places.append(taken[chosen])
        taken[chosen] += 1
    return sources, places


def sampler(total: int, consumed: int, micro: int, rank: int, dp: int) -> Iterator[list[int]]:
    """MegatronPretrainingSampler with drop_last: the samples of each micro-batch of a rank."""
    batch: list[int] = []
    for index in range(consumed, total):
        batch.append(index)
        if len(batch) == micro * dp:
            yield batch[rank * micro : (rank + 1) * micro]
            batch = []


def folder_samples(
    folder: Path, sequence: int, *, size: int, shuffle_seed: int | None = None
) -> list[list[int]]:
    """DatatroveFolderDataset: the tokens of each sample."""
    files = []
    for path in sorted(folder.glob("*.ds")):
        raw = np.fromfile(path, dtype=np.uint16 if size == 2 else np.uint32)
        count = len(raw) // (sequence + 1)
        files.append(
            [raw[i * (sequence + 1) : (i + 1) * (sequence + 1)].tolist() for i in range(count)]
        )
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(range(len(files)))
        files = [files[i] for i in order]
    return [sample for file in files for sample in file]


def positions(tokens: Sequence[int], eos: int) -> list[int]:
    """_get_positions_from_tokens: counted on from 0, and again after each end of a document."""
    found, place = [], 0
    for token in tokens:
        found.append(place)
        place = 0 if token == eos else place + 1
    return found


def positions_from_ends(ends: Sequence[int], first: int, length: int) -> list[int]:
    """_get_pos_from_index_file: the same by the ends of documents in the file."""
    found, place = [], 0
    for token in range(first, first + length):
        place = 0 if token == first or token in ends else place
        found.append(place)
        place += 1
    return found


def labels(tokens: Sequence[int], places: Sequence[int] | None) -> list[int]:
    """The collators: the next token, and no loss where a document begins."""
    following = list(tokens[1:])
    if places is None:
        return following
    return [
        -100 if place == 0 else label for label, place in zip(following, places[1:], strict=True)
    ]


def clm_windows(
    texts: Sequence[Sequence[int]], sequence: int, processes: int = 1
) -> list[list[int]]:
    """clm_process through Dataset.map: windows of groups of a thousand texts a process."""
    windows: list[list[int]] = []
    for shard in np.array_split(np.arange(len(texts)), min(processes, max(len(texts), 1))):
        for begin in range(0, len(shard), 1000):
            joined = [token for i in shard[begin : begin + 1000] for token in texts[i]]
            total = len(joined)
            if total >= sequence + 1:
                total = ((total - 1) // sequence) * sequence + 1
            starts = range(0, total - (sequence + 1), sequence)
            windows += [joined[i : i + sequence + 1] for i in starts]
    return windows
