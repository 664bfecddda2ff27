"""Tensor parallelism over real ranks, in one launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import zoo
from tests.models.tiny import save
from tests.parallel.ranks import run_ranks


@pytest.mark.slow
def test_ranks_agree_with_one_process(tmp_path: Path, golden_hf: Path) -> None:
    biases = {"attention_bias": True, "mlp_bias": True}
    save(tmp_path / "llama", "llama", tie_word_embeddings=True, **biases)
    save(tmp_path / "qwen2", "qwen2")
    save(tmp_path / "qwen2_moe", "qwen2_moe", mlp_only_layers=[1])
    save(tmp_path / "starcoder2", "starcoder2", sliding_window=7)
    for name in zoo.ZOO:
        zoo.save(name, tmp_path / name)
    run_ranks("tests.models.decoder_ranks", 2, str(tmp_path), str(golden_hf))


@pytest.mark.slow
def test_four_ranks_with_fewer_key_value_heads(tmp_path: Path) -> None:
    """Plain attention, packed by head, with a norm of all heads, with one of each, and sinks."""
    biases = {"attention_bias": True, "num_key_value_heads": 2}
    save(tmp_path / "llama", "llama", **biases)
    save(tmp_path / "starcoder2", "starcoder2", num_key_value_heads=1)
    for name in ("olmo2", "gpt_oss", "cohere, norms of queries and keys"):
        zoo.save(name, tmp_path / name, num_key_value_heads=2)
    run_ranks("tests.models.decoder_ranks", 4, str(tmp_path), "copies")
