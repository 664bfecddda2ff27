"""Tiny models with weights large enough that every part of a layer shows in the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nanotron_fast as nf
from nanotron_fast.families.parts import Param
from nanotron_fast.models import Decoder, facts_of
from tests import modelzoo

VOCAB = 96
TINY = {"num_hidden_layers": 3, "hidden_size": 48, "vocab_size": VOCAB}


def save(root: Path, family: str, **changes: Any) -> Path:
    """A model in fp32, its matrices a few times larger than those of a fresh one, norms about 1."""
    sizes: dict[str, Any] = dict(TINY)
    if family == "smollm3" and "num_hidden_layers" not in changes:
        sizes["no_rope_layers"] = [1, 1, 0]
    model = modelzoo.make(family, dtype="F32", **{**sizes, **changes})
    for name, tensor in model.tensors.items():
        values = np.frombuffer(tensor.data, "<f4")
        values = 1 + values if name.endswith("norm.weight") else 3 * values
        model.tensors[name] = tensor._replace(data=values.astype("<f4").tobytes())
    return model.save(root)


def gradients_as(decoder: Decoder, root: Path, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' gradients under Nanotron's names, by the way that weights go there."""
    from safetensors.torch import save_file

    folder = root.parent / f"{root.name}-gradients"
    folder.mkdir()
    (folder / "config.json").write_text((root / "config.json").read_text())
    save_file(
        {name: grad.contiguous() for name, grad in grads.items()}, folder / "model.safetensors"
    )
    found = {name: torch.empty_like(each) for name, each in decoder.named_parameters()}
    nf.load_into(found, folder, topology=nf.Topology(), rank=0, target="nanotron-fast")
    return {name: found[name] for name in facts_of(decoder)}


def shard_of(param: Param, whole: Tensor, tp_rank: int, tp: int) -> Tensor:
    """A rank's part of a whole parameter, each chunk cut by itself."""
    if "tp" not in param.cuts:
        return whole
    dim = param.cuts["tp"]
    if param.heads:
        spans = param.spans(tp, tp_rank)
        return torch.cat([whole.narrow(dim, span.whole, span.length) for span in spans], dim)
    sections = whole.split(list(param.chunks or [whole.shape[dim]]), dim)
    return torch.cat([section.chunk(tp, dim)[tp_rank] for section in sections], dim)


def tokens(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and labels, some of which count for nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, length), generator=generator)
    labels = torch.randint(VOCAB, (rows, length), generator=generator)
    labels[0, 2:5] = -100
    return ids, labels


def assert_near(ours: Tensor, theirs: Tensor, what: str, relative: float = 2e-5) -> None:
    """Relative to the largest value."""
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    error, scale = float((ours - theirs).detach().abs().max()), float(theirs.detach().abs().max())
    assert error <= relative * scale, f"{what}: {error} apart, of {scale}"
