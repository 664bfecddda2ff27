"""Llamas to train, and the tokens of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.model.spec import Attention, Dense, Layer, ModelSpec
from nanotron_fast.models.architecture import Architecture


@dataclass(frozen=True)
class Shape:
    """A Llama without tied embeddings, and a global batch."""

    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    length: int
    rows: int
    micro_batches: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.length * self.rows * self.micro_batches

    @property
    def parameters(self) -> int:
        packed = (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = packed * self.hidden + self.hidden**2 + 3 * self.hidden * self.inter
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * layer + norms + 2 * self.vocab * self.hidden

    @property
    def flops(self) -> int:
        """Of a step, by the formula of `nanotron_fast.train.estimate`."""
        norms = (2 * self.layers + 1) * self.hidden
        multiplied = self.parameters - norms - self.vocab * self.hidden
        pairs = self.length * (self.length + 1) // 2
        scores = 12 * self.layers * self.hidden * pairs * self.rows * self.micro_batches
        return 6 * multiplied * self.tokens + scores

    @property
    def architecture(self) -> Architecture:
        attention = Attention(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rotary=(0, self.head_dim),
        )
        spec = ModelSpec(
            hidden_size=self.hidden,
            layers=(Layer(attention, Dense(self.inter)),) * self.layers,
            intermediate_size=self.inter,
            vocab_size=self.vocab,
            max_position_embeddings=self.length,
            hidden_act="silu",
            norm_eps=1e-5,
            initializer_range=0.02,
            rope_theta=10000.0,
            tie_word_embeddings=False,
        )
        return Architecture.of_spec(spec, family="llama")

    @property
    def config(self) -> dict[str, Any]:
        """The same as arguments of transformers' LlamaConfig."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.inter,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.length,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "use_cache": False,
        }


# 100 M parameters, with so small a vocabulary that most of them are in the layers.
SMALL = Shape(768, 2048, 12, 12, 4, 16000, length=512, rows=1, micro_batches=2)
_ONE = Shape(2048, 5632, 22, 32, 4, 32000, length=4096, rows=2, micro_batches=1)
_THREE = Shape(3072, 8192, 28, 24, 8, 32000, length=4096, rows=1, micro_batches=1)
# What is timed on a GPU, the quickest to tell first.
SETTINGS = {
    "1B, 4k tokens": _ONE,
    "3B, 4k tokens": _THREE,
    "1B, 8k tokens": replace(_ONE, length=8192, rows=1),
    "3B, 8k tokens": replace(_THREE, length=8192),
}


def tiny(shape: Shape) -> Shape:
    """For a dry run: as small as shows that all of it runs, and yet of its own size."""
    return replace(
        shape,
        hidden=32,
        inter=48,
        layers=1 + shape.layers // 25,
        heads=2,
        kv_heads=1,
        vocab=64,
        length=shape.length // 256,
    )
