"""Makes Hugging Face checkpoints of real shapes with random weights, quickly and without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nanotron_fast.families import family_of_config
from nanotron_fast.families.hf_config import read_config
from nanotron_fast.formats.huggingface.checkpoint import CONFIG, INDEX, layout_shards
from nanotron_fast.formats.new_files import NewFile
from nanotron_fast.moves.dtypes import Dtype

# Architectures by name; what is not here has transformers' defaults.
SHAPES: dict[str, dict[str, object]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama-1.1b-8kv": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "llama-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "llama-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
    "llama-405b": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    # As many layers and experts, and as wide, as DeepSeek-V3 has; its attention is another.
    "qwen2-moe-671b": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "shared_expert_intermediate_size": 2048,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "mlp_only_layers": [0, 1, 2],
        "num_hidden_layers": 61,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "vocab_size": 129280,
    },
}


def make_model(
    root: Path, shape: str, *, dtype: Dtype = Dtype.BF16, num_shards: int = 1, seed: int = 0
) -> int:
    """Writes a llama of a shape to a new directory; returns the bytes of its tensor files."""
    files = _layout(root, shape, dtype, num_shards)
    random = np.random.default_rng(seed)
    for file in files:
        with open(root / file.name, "wb") as out:
            out.write(file.header)
            left = file.size_bytes - len(file.header)
            while left:
                block = _weights(random, min(left, 1 << 26), dtype)
                out.write(block)
                left -= len(block)
    return sum(file.size_bytes for file in files)


def make_hollow_model(root: Path, shape: str, *, num_shards: int = 1) -> None:
    """The same with holes for weights: headers of any size of model, on any disk."""
    for file in _layout(root, shape, Dtype.BF16, num_shards):
        with open(root / file.name, "wb") as out:
            out.write(file.header)
            out.truncate(file.size_bytes)


def _layout(root: Path, shape: str, dtype: Dtype, num_shards: int) -> list[NewFile]:
    """Writes config and index, and says which tensor files there are to be."""
    root.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype.torch_name,
        "max_position_embeddings": 2048,
        **SHAPES[shape],
    }
    (root / CONFIG).write_text(json.dumps(config, indent=2))
    family = family_of_config(config)
    tensors = [
        (address.name, dtype, address.shape)
        for param in family.params(read_config(family, config))
        for address in dict.fromkeys(part.tensors[0] for part in param.parts)
    ]
    total = sum(int(np.prod(shape)) * dtype.itemsize for _, dtype, shape in tensors)
    files, index = layout_shards(tensors, -(-total // num_shards) if num_shards > 1 else total)
    if index is not None:
        (root / INDEX).write_bytes(index)
    return files


def _weights(random: np.random.Generator, num_bytes: int, dtype: Dtype) -> bytes:
    """Small values, as weights are: a random sign and mantissa under a fixed exponent."""
    if dtype is Dtype.F32:
        bits = random.integers(0, 1 << 32, num_bytes // 4, np.uint32)
        return ((bits & np.uint32(0x807FFFFF)) | np.uint32(0x3C800000)).tobytes()
    bits = random.integers(0, 1 << 16, num_bytes // 2, np.uint16)
    if dtype is Dtype.BF16:
        return ((bits & np.uint16(0x807F)) | np.uint16(0x3C80)).tobytes()
    return ((bits & np.uint16(0x83FF)) | np.uint16(0x2400)).tobytes()
