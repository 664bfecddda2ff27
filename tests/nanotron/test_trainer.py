"""Nanotron's own trainer runs on the CPU, from a configuration file to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from tests.nanotron.installed import has_qwen2
from tests.nanotron.training import free_port
from tests.parallel.ranks import run_ranks


def test_it_trains_and_saves(tmp_path: Path) -> None:
    # The Llama of main cannot be initialised at random: its StandardParametrizator is given the
    # wrong part of the configuration.
    family = "qwen2" if has_qwen2() else "llama"
    folder = tmp_path / "checkpoints"
    words = [str(folder), str(free_port()), family]
    run_ranks("tests.nanotron.trainer_ranks", 2, *words)
    saved = folder / "2"
    metadata = json.loads((saved / "checkpoint_metadata.json").read_text())
    assert metadata["tp"] == 2
    shards = sorted(path.name for path in (saved / "model").rglob("qkv_proj/*weight*.safetensors"))
    assert len(shards) == 4  # of two layers, by two ranks
    assert (saved / "model_config.json").is_file()
