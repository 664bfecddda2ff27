"""The data stages of a configuration, and what is held out of them for validation."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nanotron_fast import convert
from nanotron_fast.cli.commands import app
from nanotron_fast.errors import DataError
from nanotron_fast.train.config import TrainingConfig
from nanotron_fast.train.data import Consumed, StagedBatches, batches_of
from nanotron_fast.train.data.batches import MicroBatch
from nanotron_fast.train.data.held_out import num_held_out
from tests.modelzoo import make
from tests.ordinary_user import ordinary_user
from tests.test_guides import ROOT, blocks
from tests.train.configs import document
from tests.train.data.material import TEXT, write_tokens
from tests.train.data.nanotron_order import blend, folder_samples, labels, positions

TOKENS = {
    "sequence_length": 16,
    "train_steps": 10,
    "micro_batch_size": 2,
    "batch_accumulation_per_replica": 2,
}


def config_of(
    *datasets: Any, starts: tuple[int, ...] = (1,), lengths: tuple[int, ...] = (), **changes: Any
) -> TrainingConfig:
    """A configuration with such data, and values at other paths."""
    stages = [
        {
            "name": f"stage {number}",
            "start_training_step": start,
            "data": {"dataset": dataset, "seed": 7, "num_loading_workers": 0},
            **({"sequence_length": lengths[number]} if lengths else {}),
        }
        for number, (start, dataset) in enumerate(zip(starts, datasets, strict=True))
    ]
    return TrainingConfig.from_dict(
        document(**{"tokens": TOKENS, "data_stages": stages, **changes})
    )


def equal(some: list[MicroBatch], others: list[MicroBatch]) -> bool:
    def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
        if one is None or other is None:
            return one is other
        return torch.equal(one, other)

    return len(some) == len(others) and all(
        same(one.input_ids, other.input_ids)
        and same(one.labels, other.labels)
        and same(one.position_ids, other.position_ids)
        for one, other in zip(some, others, strict=True)
    )


def rows(batches: list[MicroBatch]) -> list[list[int]]:
    return [row for micro in batches for row in micro.input_ids.tolist()]


def make_nanosets(folder: Path) -> list[Path]:
    random = np.random.default_rng(1)
    folders = [folder / "one", folder / "two"]
    for number, each in enumerate(folders):
        for name in ("a.ds", "b.ds", "c.ds"):
            documents = [
                [*random.integers(2, 300, random.integers(1, 40)).tolist(), 1]
                for _ in range(30 + 20 * number)
            ]
            write_tokens(each, name, documents)
    return folders


def test_nanosets_are_blended_as_in_nanotron(tmp_path: Path, tokenizer_folder: Path) -> None:
    folders = make_nanosets(tmp_path)
    dataset = {
        "dataset_folder": {str(folders[0]): 0.7, str(folders[1]): 0.3},
        "shuffle_files": True,
    }
    config = config_of(dataset, tokenizer__tokenizer_name_or_path=str(tokenizer_folder))
    batches = batches_of(config)
    samples = [folder_samples(each, 16, size=2, shuffle_seed=7) for each in folders]
    sources, places = blend([0.7, 0.3], 40)
    expected = [
        samples[source][place % len(samples[source])]
        for source, place in zip(sources, places, strict=True)
    ]
    for step in (1, 2, 10):
        found = batches.batch(step)
        wanted = expected[4 * (step - 1) : 4 * step]
        assert rows(found) == [each[:-1] for each in wanted]
        # Nanotron's Llama has no positions, and learns no first token of a document.
        assert found[0].position_ids is None
        learned = [row for micro in found for row in micro.labels.tolist()]
        assert learned == [labels(each, positions(each, 1)) for each in wanted]
    taken = np.bincount(sources, minlength=2) * 16
    assert batches.stages[0].consumed_tokens(10) == {
        str(each): int(count) for each, count in zip(folders, taken, strict=True)
    }
    # As many as Nanotron's metadata must sum up to.
    assert sum(batches.stages[0].consumed_tokens(7).values()) == 7 * 4 * 16


def test_documents_are_kept_apart_where_the_model_does(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    [folder, _] = make_nanosets(tmp_path)
    sections = {"tokenizer__tokenizer_name_or_path": str(tokenizer_folder)}
    llama = config_of({"dataset_folder": str(folder)}, **sections)
    model = dict(llama.model.model_config or {})
    for flags, has_positions, drops in (
        ({"_use_doc_masking": True}, True, True),
        ({"is_qwen2_config": True, "_use_doc_masking": False}, False, False),
        ({}, False, True),
    ):
        batches = batches_of(llama.with_model_config({**model, **flags}))
        [first, *_] = batches.batch(1)
        sample = folder_samples(folder, 16, size=2)[0]
        assert (first.position_ids is not None) == has_positions
        if first.position_ids is not None:
            assert first.position_ids[0].tolist() == positions(sample, 1)[:-1]
        assert first.labels[0].tolist() == labels(sample, positions(sample, 1) if drops else None)
    text = tmp_path / "a.txt"
    text.write_text(TEXT * 40)
    config = config_of({"hf_dataset_or_datasets": str(text)}, **sections)
    assert batches_of(config).batch(1)[0].position_ids is None
    apart = config.with_model_config({**model, "_use_doc_masking": True})
    assert batches_of(apart).batch(1)[0].position_ids is not None


def test_stages_have_their_own_length_and_the_later_goes_on_in_a_folder(tmp_path: Path) -> None:
    folders = make_nanosets(tmp_path)
    same = {"dataset_folder": str(folders[0])}
    both = {"dataset_folder": [str(each) for each in folders]}
    config = config_of(None, same, both, same, starts=(1, 3, 5, 8), lengths=(16, 16, 16, 8))
    batches = batches_of(config)
    assert [(each.first_step, each.last_step) for each in batches.stages] == [
        (1, 2),
        (3, 4),
        (5, 7),
        (8, 10),
    ]
    assert [batches.batch(step)[0].input_ids.shape[1] for step in (1, 4, 5, 8, 10)] == [
        16,
        16,
        16,
        8,
        8,
    ]
    assert batches.stage_at(4).name == "stage 1"
    one, two = (folder_samples(each, 16, size=2) for each in folders)
    assert rows(batches.batch(3))[0] == one[0][:-1]
    # Steps 3 and 4 took 8 samples of the first folder; what follows begins beyond them.
    sources, places = blend([1, 1], 12)
    expected = [
        (one[8 + place] if source == 0 else two[place])[:-1]
        for source, place in zip(sources, places, strict=True)
    ]
    assert [row for step in (5, 6, 7) for row in rows(batches.batch(step))] == expected
    # 14 samples of 17 tokens are 26 and a half of 9.
    short = folder_samples(folders[0], 8, size=2)
    assert rows(batches.batch(8))[0] == short[27][:-1]


def test_a_run_that_goes_on_sees_what_it_would_have_seen(tmp_path: Path) -> None:
    folders = make_nanosets(tmp_path)
    both = {"dataset_folder": [str(each) for each in folders]}
    config = config_of(both, both, None, starts=(1, 4, 8))
    straight = batches_of(config)
    resumed = batches_of(config, consumed=Consumed(5, (12, 8)))
    for step in range(6, 11):
        assert equal(straight.batch(step), resumed.batch(step))
    assert straight.stages[1].consumed_samples(5) == 8
    with pytest.raises(ValueError, match="step 5 comes before step 6"):
        resumed.batch(5)


def test_another_dp_goes_on_with_the_next_sample(tmp_path: Path) -> None:
    """With twice the ranks a step takes twice the samples, and none is lost or seen twice."""
    [folder, _] = make_nanosets(tmp_path)
    dataset = {"dataset_folder": str(folder)}
    before = batches_of(config_of(dataset))
    wide = config_of(dataset, parallelism__dp=2)
    ranks = [batches_of(wide, dp_rank=rank, consumed=Consumed(3, (12,))) for rank in (0, 1)]
    seen = [row for step in (1, 2, 3) for row in rows(before.batch(step))]
    for step in (4, 5):
        micros = [each.batch(step) for each in ranks]
        seen += [row for pair in zip(*micros, strict=True) for row in rows(list(pair))]
    expected = [each[:-1] for each in folder_samples(folder, 16, size=2)]
    assert seen == expected[:28]
    assert ranks[0].stages[0].consumed_samples(5) == 28


def test_validation_takes_samples_that_are_never_trained_on(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    text = tmp_path / "a.txt"
    letters = np.random.default_rng(0).integers(97, 123, 4000).astype(np.uint8)
    text.write_bytes(letters.tobytes())
    folders = make_nanosets(tmp_path)
    tokens = {"val_check_interval": 2, "limit_val_batches": 3, "train_steps": 60}
    tokenizer = {"tokenizer__tokenizer_name_or_path": str(tokenizer_folder)}
    for dataset in (
        {"hf_dataset_or_datasets": str(text)},
        {"dataset_folder": [str(each) for each in folders]},
        None,
    ):
        config = config_of(
            dataset,
            tokens={**TOKENS, **tokens},
            **tokenizer,
            parallelism__dp=2,
        )
        ranks = [batches_of(config, dp_rank=rank) for rank in (0, 1)]
        validated = [row for each in ranks for row in rows(each.validation(4))]
        assert len(validated) == len({tuple(row) for row in validated}) == 12
        assert [micro.input_ids.shape[0] for micro in ranks[0].validation(4)] == [2, 2, 2]
        assert equal(ranks[0].validation(4), ranks[0].validation(8))
        trained = {
            tuple(row) for each in ranks for step in range(1, 61) for row in rows(each.batch(step))
        }
        assert not trained & {tuple(row) for row in validated}
    without = batches_of(config_of(None))
    assert without.validation(2) == []


def test_neither_dp_nor_the_size_of_a_validation_changes_what_is_trained_on(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Long enough that the data are read again: what is held out then matters."""
    text = tmp_path / "a.txt"
    text.write_text(TEXT * 8)
    folders = make_nanosets(tmp_path)
    blended = {"dataset_folder": {str(folders[0]): 0.7, str(folders[1]): 0.3}}
    tokenizer = {"tokenizer__tokenizer_name_or_path": str(tokenizer_folder)}

    def seen(
        dataset: object, dp: int, size: int, accumulation: int, validation: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """What all ranks train on and validate on, in the order of the samples."""
        sizes = {"micro_batch_size": size, "batch_accumulation_per_replica": accumulation}
        checked = {"val_check_interval": 2, "limit_val_batches": validation, "train_steps": 60}
        tokens = {**TOKENS, **sizes, **checked}
        config = config_of(dataset, tokens=tokens, parallelism__dp=dp, **tokenizer)
        ranks = [batches_of(config, dp_rank=rank) for rank in range(dp)]

        def joined(parts: list[list[MicroBatch]]) -> list[list[int]]:
            return [row for micros in zip(*parts, strict=True) for row in rows(list(micros))]

        trained = [
            row for step in range(1, 61) for row in joined([each.batch(step) for each in ranks])
        ]
        return trained, joined([each.validation(2) for each in ranks])

    for dataset in ({"hf_dataset_or_datasets": str(text)}, blended, None):
        trained, validated = seen(dataset, 1, 2, 2, 2)
        assert seen(dataset, 2, 2, 1, 1) == (trained, validated)
        assert seen(dataset, 2, 1, 2, 2) == (trained, validated)
        again, longer = seen(dataset, 1, 2, 2, 3)
        assert (again, longer[:4]) == (trained, validated)


def test_what_is_held_out_is_a_share_of_the_data() -> None:
    counts = {2: 1, 10: 1, 48: 5, 40_960: 4096, 409_600: 4096, 1_000_000: 10_000}
    assert {size: num_held_out(size) for size in counts} == counts


def test_a_validation_larger_than_what_is_held_out(tmp_path: Path, tokenizer_folder: Path) -> None:
    """It takes the same samples again, and the run says so."""
    text = tmp_path / "a.txt"
    text.write_bytes(b"abcdefghijklmnopq" * 4)
    tokenizer = {"tokenizer__tokenizer_name_or_path": str(tokenizer_folder)}
    dataset = {"hf_dataset_or_datasets": str(text)}
    tokens = {**TOKENS, "val_check_interval": 2, "limit_val_batches": 3}
    batches = batches_of(config_of(dataset, **tokenizer, tokens={**tokens, "sequence_length": 4}))
    held_out = num_held_out(17)
    assert held_out < 6
    validated = rows(batches.validation(2))
    assert len(validated) == 6
    assert validated[held_out:] == validated[:-held_out]
    [note] = [each for each in batches.notes if "validation" in each]
    assert "a validation takes 6 samples" in note
    assert "limit_val_batches" in note
    text.write_text("abc")
    short = config_of(dataset, **tokenizer, tokens={**tokens, "sequence_length": 2})
    with pytest.raises(DataError, match=r"a\.txt: it has 1 sample.*val_check_interval"):
        batches_of(short)


def test_conversations_are_packed_and_kept_apart(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "chat.jsonl"
    with path.open("w") as stream:
        for number in range(40):
            messages = [
                {"role": "user", "content": f"q{number}"},
                {"role": "assistant", "content": "yes"},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")
    dataset = {"hf_dataset_or_datasets": str(path), "sft_dataloader": True}
    tokenizer = {"tokenizer__tokenizer_name_or_path": str(tokenizer_folder)}
    config = config_of(dataset, **tokenizer, lengths=(60,))
    [first, *_] = batches_of(config).batch(1)
    assert first.position_ids is not None
    assert int((first.position_ids == 0).sum()) > 4
    assert 0 < int((first.labels >= 0).sum()) < first.labels.numel() / 2


def test_what_a_user_should_know(tmp_path: Path, tokenizer_folder: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(TEXT * 8)
    tokenizer = {"tokenizer__tokenizer_name_or_path": str(tokenizer_folder)}
    config = config_of({"hf_dataset_or_datasets": str(text)}, **tokenizer)
    batches: StagedBatches = batches_of(config)
    [note] = batches.notes
    assert "takes 40 samples of 16 tokens" in note
    assert equal(batches.batch(3), batches_of(config).batch(3))
    assert batches_of(config_of(None)).notes == ()


def test_the_vocabulary_and_the_tokenizer_are_those_beside_the_weights(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    model = make("qwen2", vocab_size=340).save(tmp_path / "model")
    shutil.copytree(tokenizer_folder, model, dirs_exist_ok=True)
    text = tmp_path / "a.txt"
    text.write_text(TEXT * 40)
    begin = {"model__model_config": ..., "model__init_method": {"path": str(model)}}
    config = config_of({"hf_dataset_or_datasets": str(text)}, **begin)
    batches = batches_of(config)
    assert batches.stages[0].training.vocab_size == 340
    # With a vocabulary or without, it is a Qwen2, whose first tokens are learned.
    for each in (batches, batches_of(config, vocab_size=1000)):
        assert each.stages[0].training.learns_first_tokens
    # The newest checkpoint of a run stands for it, as in train.
    convert(model, tmp_path / "run" / "5")
    (tmp_path / "run" / "latest.txt").write_text("5")
    begin["model__init_method"] = {"path": str(tmp_path / "run")}
    of_run = batches_of(config_of({"hf_dataset_or_datasets": str(text)}, **begin))
    assert of_run.stages[0].training.vocab_size == 340
    assert rows(of_run.batch(1))[0] == rows(batches.batch(1))[0]


def test_what_the_documents_show_reads_the_guides_configuration(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make("llama", vocab_size=340).save(tmp_path / "llama-hf")
    shutil.copytree(tokenizer_folder, "llama-hf", dirs_exist_ok=True)
    Path("texts").mkdir()
    Path("texts", "a.txt").write_text(TEXT * 40)
    [whole] = blocks(ROOT / "docs" / "continue-pretraining.md", "yaml")
    Path("train.yaml").write_text(whole)
    [shown] = blocks(ROOT / "docs" / "training-data.md", "python")
    done: dict[str, Any] = {}
    exec(shown, done)
    assert done["micro"].input_ids.shape == done["micro"].labels.shape == (4, 128)


def test_data_that_are_not_for_this_model(tmp_path: Path, tokenizer_folder: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(TEXT * 40)
    tokenizer = {"tokenizer__tokenizer_name_or_path": str(tokenizer_folder)}
    config = config_of({"hf_dataset_or_datasets": str(text)}, **tokenizer)
    with pytest.raises(DataError, match=r"its vocabulary is 320, and the model's is 300"):
        batches_of(config, vocab_size=300)
    [folder, _] = make_nanosets(tmp_path)
    with pytest.raises(DataError, match=r"one/a\.ds, from token .*vocabulary of 50"):
        batches_of(config_of({"dataset_folder": str(folder)}), vocab_size=50).batch(1)
    stated = config_of({"dataset_folder": str(folder), "vocab_size": 600})
    with pytest.raises(DataError, match="vocab_size is 600, and the model's is 512"):
        batches_of(stated)
    missing = config_of({"hf_dataset_or_datasets": str(tmp_path / "no.txt")}, **tokenizer)
    with pytest.raises(DataError, match=r"no\.txt: there is no such file or folder"):
        batches_of(missing)


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ({"dataset_folder": "gone"}, "dataset_folder: gone: there is no such folder"),
        ({"hf_dataset_or_datasets": "./txts"}, "hf_dataset_or_datasets: ./txts: there is no such"),
        (
            {"hf_dataset_or_datasets": "txts"},
            "hf_dataset_or_datasets: txts: there is no such file or folder; as a dataset of the "
            "Hub it needs datasets, not installed here: pip install 'nanotron_fast[train]'",
        ),
    ],
)
def test_data_that_are_not_there_are_told_by_their_key(
    dataset: dict[str, str],
    said: str,
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    tokenizer = {"tokenizer__tokenizer_name_or_path": str(tokenizer_folder)}
    config = config_of(None, dataset, starts=(1, 5), **tokenizer)
    said = f"config: data_stages (stage 1): {said}"
    with pytest.raises(DataError) as caught:
        batches_of(config)
    assert str(caught.value).startswith(said)
    # A dry run says the same, and goes on: the data may be on another machine.
    path = tmp_path / "train.yaml"
    path.write_text(config.to_yaml())
    found = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
    assert found.exit_code == 0, found.output
    [*_, told] = found.stderr.splitlines()
    assert told.startswith(f"warning: {path}{said.removeprefix('config')}")


@pytest.mark.parametrize("key", ["dataset_folder", "hf_dataset_or_datasets"])
def test_a_dry_run_warns_of_data_that_may_not_be_looked_at(
    key: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    tokenizer = {"tokenizer__tokenizer_name_or_path": str(tokenizer_folder)}
    path = tmp_path / "train.yaml"
    config = config_of(None, {key: str(locked / "in")}, starts=(1, 5), **tokenizer)
    path.write_text(config.to_yaml())
    locked.chmod(0)
    with ordinary_user():
        found = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
    locked.chmod(0o755)
    assert found.exit_code == 0, found.output
    told = f"warning: {path}: data_stages (stage 1): {key}: {locked / 'in'}: "
    # Newer Pythons take what they may not look at for nothing.
    reasons = (f"{told}Permission denied", f"{told}there is no such f")
    assert found.stderr.splitlines()[-1].startswith(reasons)
