"""The tables of rotary embeddings that a captured CUDA graph reads, with the capture pretended."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

from nanotron_fast.kernels.runtime import capture
from nanotron_fast.models.rotary import Rotary
from nanotron_fast.patch.nanotron.replacements import attention
from nanotron_fast.patch.nanotron.targets import DropInOptions

CPU = torch.device("cpu")


def of_a_model():
    """Asks for the tables of so many positions."""
    spec = SimpleNamespace(
        rope_scaling=None, rope_kind="default", max_position_embeddings=64, rope_theta=1e4
    )
    rotary, layer = Rotary(spec), SimpleNamespace(rotary=(0, 8), rope_theta=None)
    return lambda length: rotary.tables(layer, length, CPU)


def of_llama_in_the_drop_in():
    own = SimpleNamespace(d_qk=8, flash_rotary_embedding=SimpleNamespace(base=1e4))
    return lambda length: attention.llama_rotary(own, length, 2, CPU, DropInOptions())


def of_qwen2_in_the_drop_in():
    own = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=64),
        rotary_emb=SimpleNamespace(base=1e4),
        head_dim=8,
        cp_pg=SimpleNamespace(rank=lambda: 0),
        cp_pg_size=1,
    )
    return lambda length: attention.qwen2_rotary(own, length, 2 * length, CPU, DropInOptions())


def forget() -> None:
    attention._tables.cache_clear()
    attention._positions.cache_clear()


@pytest.mark.parametrize("make", [of_a_model, of_llama_in_the_drop_in, of_qwen2_in_the_drop_in])
def test_tables_that_a_graph_reads_stay(monkeypatch, make) -> None:
    """Longer ones take their place where they are remembered: replays read what they read."""
    forget()
    monkeypatch.setattr(capture, "_kept", {})
    tables = make()
    capturing = pytest.MonkeyPatch()
    capturing.setattr(capture, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"a CUDA graph captures .* new: run it once"):
        tables(16)
    capturing.undo()
    eager = [weakref.ref(each) for each in tables(16)]
    tables(600)
    forget()
    assert all(each() is None for each in eager)
    tables(700)
    capturing.setattr(capture, "is_capturing", lambda device: True)
    read = [weakref.ref(each) for each in tables(700)]
    capturing.undo()
    tables(5000)
    forget()
    assert all(each() is not None for each in read)
