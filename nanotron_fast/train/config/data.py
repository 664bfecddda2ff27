"""The section `data_stages`: which samples a run is trained on, and from which step on.

Names, order and defaults of the fields are those of nanotron/config/config.py at 2411b022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from nanotron_fast.train.config.place import Place
from nanotron_fast.train.config.schema import (
    FILLED,
    FILLED_AND_REQUIRED,
    Above,
    Amount,
    Count,
    ToldApart,
)

DEFAULT_SEED = 42


@dataclass(frozen=True, slots=True, kw_only=True)
class HfDataset:
    """Text to tokenise: files of ours, or what `datasets.load_dataset` takes.

    Args:
        hf_dataset_or_datasets: a dataset's name; a file, folder or glob of .txt or .jsonl; several
            of these; or several with their weights.
        hf_dataset_splits: of each dataset.
        hf_dataset_config_name: of each dataset.
        dataset_processing_num_proc_per_process: processes that tokenise.
        dataset_overwrite_cache: tokenise again what a cache holds.
        text_column_name: the column, or JSON key, that holds the text.
    """

    hf_dataset_or_datasets: str | tuple[str, ...] | Mapping[str, float]
    hf_dataset_splits: str | tuple[str, ...] = field(default="train", metadata=FILLED)
    hf_dataset_config_name: str | None = None
    dataset_processing_num_proc_per_process: Count = field(default=1, metadata=FILLED)
    dataset_overwrite_cache: bool = field(default=False, metadata=FILLED)
    text_column_name: str = field(default="text", metadata=FILLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class SftDataset:
    """Conversations: the chat template makes tokens of them, and the answers alone have a loss.

    Args:
        sft_dataloader: says that this is one; never false.
        debug_max_samples: use so many samples alone.
        others: as in HfDataset.
    """

    hf_dataset_or_datasets: str | tuple[str, ...] | Mapping[str, float]
    hf_dataset_splits: str | tuple[str, ...] = field(default="train", metadata=FILLED)
    hf_dataset_config_name: str | None = None
    dataset_processing_num_proc_per_process: Count = field(default=1, metadata=FILLED)
    dataset_overwrite_cache: bool = field(default=False, metadata=FILLED)
    sft_dataloader: Literal[True] = field(default=True, metadata=FILLED)
    debug_max_samples: Count | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nanoset:
    """Folders of token ids on disk (.ds), as datatrove writes them.

    Args:
        dataset_folder: the folders.
        dataset_weights: how often to draw from each; None for all alike.
        dataset_read_path: a copy of each folder to read instead.
        tokenizer_name: of all folders; None to take it from their metadata.
        vocab_size: of that tokenizer; None likewise.
        token_size_in_bytes: 2 or 4; None likewise.
        return_positions: positions begin anew with each document.
        skip_in_stream: no effect; reading is by position.
        pad_samples_to_global_batch_size: no effect; a dataset is read again from its start.
        dataset_max_tokens: read so many tokens of each folder alone.
        shuffle_files: permute the files of a folder by the seed.
        use_old_brrr_dataloader: as Nanotron's older reader, without positions.
    """

    dataset_folder: tuple[str, ...]
    dataset_weights: tuple[Annotated[float, Above(0)], ...] | None = None
    dataset_read_path: tuple[str, ...] | None = None
    tokenizer_name: str | None = None
    vocab_size: Count | None = None
    token_size_in_bytes: Literal[2, 4] | None = None
    return_positions: bool = field(default=True, metadata=FILLED)
    skip_in_stream: bool = field(default=False, metadata=FILLED)
    pad_samples_to_global_batch_size: bool = field(default=False, metadata=FILLED)
    dataset_max_tokens: tuple[Count, ...] | None = None
    shuffle_files: bool = field(default=False, metadata=FILLED)
    use_old_brrr_dataloader: bool = field(default=False, metadata=FILLED)

    @staticmethod
    def prepared(document: Mapping[str, Any], place: Place) -> dict[str, Any]:
        """One folder by its name alone, or folders with their weights, become lists."""
        lists = dict(document)
        folders = lists.get("dataset_folder")
        if isinstance(folders, str):
            lists |= {"dataset_folder": [folders], "dataset_weights": [1]}
        elif isinstance(folders, Mapping):
            if lists.get("dataset_weights") is not None:
                raise place.at("dataset_weights").error(
                    " is given, and dataset_folder has weights as well: one of the two is enough"
                )
            lists |= {"dataset_folder": [*folders], "dataset_weights": [*folders.values()]}
        if isinstance(lists.get("dataset_read_path"), str):
            lists["dataset_read_path"] = [lists["dataset_read_path"]]
        return lists


Dataset = HfDataset | SftDataset | Nanoset


def _dataset_kind(document: Mapping[str, Any], place: Place) -> type:
    """Which dataset a mapping describes. An SFT dataset is known by the keys that it has alone."""
    if "dataset_folder" in document:
        return Nanoset
    if "hf_dataset_or_datasets" not in document:
        raise place.error(
            " has neither dataset_folder (tokens on disk) nor hf_dataset_or_datasets (text, or "
            "conversations where sft_dataloader is true)"
        )
    is_sft = "sft_dataloader" in document or "debug_max_samples" in document
    return SftDataset if is_sft else HfDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Where the samples of a stage come from.

    Args:
        dataset: None for synthetic tokens.
        seed: of synthetic tokens, and of a permutation of files.
        num_loading_workers: no effect.
    """

    dataset: Annotated[HfDataset | SftDataset | Nanoset | None, ToldApart(_dataset_kind)]
    seed: int = field(default=DEFAULT_SEED, metadata=FILLED_AND_REQUIRED)
    num_loading_workers: Amount = field(default=1, metadata=FILLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataStage:
    """What is trained on from one step on, until the next stage begins.

    Args:
        name: unique among the stages.
        start_training_step: the first step of it; the first stage starts at 1.
        data: its samples.
        sequence_length: in tokens; None for that of `tokens`, which a read configuration has put
            here already.
    """

    name: str
    start_training_step: Count
    data: Data
    sequence_length: Count | None = None
