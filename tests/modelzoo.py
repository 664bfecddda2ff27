"""Tiny random Hugging Face checkpoints of every family, made without transformers.

The tables of tensors and of class defaults here are written independently of nanotron_fast's, so
that a mistake in those does not hide in both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FAMILIES = ("llama", "mistral", "qwen2", "smollm3", "qwen2_moe", "starcoder2")
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "vocab_size": 160,
}
_LLAMA: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_WINDOW = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
_NO_BIAS_KEYS = {"attention_bias": None, "mlp_bias": None}

# What transformers 4.57 assumes of a key that config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, **_NO_BIAS_KEYS, "sliding_window": 4096},
    "qwen2": {**_LLAMA, **_NO_BIAS_KEYS, **_NO_TOKENS, **_WINDOW},
    "smollm3": {
        **_LLAMA,
        **_WINDOW,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {
        **_LLAMA,
        **_NO_BIAS_KEYS,
        **_NO_TOKENS,
        **_WINDOW,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
        "qkv_bias": True,
        "router_aux_loss_coef": 0.001,
    },
    "starcoder2": {
        **_LLAMA,
        **_NO_BIAS_KEYS,
        "attention_dropout": 0.0,
        "bos_token_id": 50256,
        "embedding_dropout": 0.0,
        "eos_token_id": 50256,
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "residual_dropout": 0.0,
        "rms_norm_eps": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_bias": True,
    },
}
# What a model of ours differs from them in, besides its sizes.
_OURS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5},
    "mistral": {"sliding_window": None},
    "qwen2": {"rope_theta": 1e6, "eos_token_id": 7},
    "smollm3": {
        "no_rope_layer_interval": 3,
        "no_rope_layers": [1, 1, 0, 1, 1, 0],
        "bos_token_id": 3,
        "eos_token_id": 4,
        "pad_token_id": 5,
    },
    "qwen2_moe": {
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 40,
    },
    "starcoder2": {"bos_token_id": 0, "eos_token_id": 0},
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}


class Tensor(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class Model:
    """A checkpoint in memory. `config` has every key; how many are written is `save`'s choice."""

    family: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    generation_config: dict[str, Any] | None = None
    tokenizer: dict[str, bytes] = field(default_factory=dict)

    def save(
        self,
        root: Path,
        *,
        style: str = "full",
        shards: int = 1,
        is_stacked: bool = False,
        extra: dict[str, Tensor] | None = None,
    ) -> Path:
        """Writes it. `style` is "full", or "4" or "5" for the way that transformers has it."""
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / "config.json", self.written_config(style))
        if self.generation_config is not None:
            write_json(root / "generation_config.json", self.generation_config)
        for name, data in self.tokenizer.items():
            (root / name).write_bytes(data)
        tensors = {**(self.stacked() if is_stacked else self.tensors), **(extra or {})}
        save_tensors(root, tensors, shards)
        return root

    def written_config(self, style: str) -> dict[str, Any]:
        """`config.json` as a version of transformers writes it."""
        config = {
            "architectures": [_ARCHITECTURES[self.family]],
            "model_type": self.family,
            "torch_dtype": TORCH_NAMES[next(iter(self.tensors.values())).dtype],
            **self.config,
        }
        if style == "full":
            return config
        defaults = DEFAULTS[self.family]
        config = {
            key: value
            for key, value in config.items()
            if key not in defaults or defaults[key] != value
        }
        config["dtype"] = config.pop("torch_dtype")
        config["transformers_version"] = "4.57.3"
        if style == "5":
            theta = config.pop("rope_theta", defaults["rope_theta"])
            scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
            config["rope_parameters"] = {"rope_theta": theta, **scaling}
            config["transformers_version"] = "5.23.0"
        return config

    def stacked(self) -> dict[str, Tensor]:
        """The tensors, those of all experts of a layer in one."""
        result = {name: t for name, t in self.tensors.items() if ".mlp.experts." not in name}
        experts = self.config.get("num_experts", 0)
        for layer in moe_layers(self.config):
            prefix = f"model.layers.{layer}.mlp.experts"
            parts = [
                {
                    kind: self.tensors[f"{prefix}.{expert}.{kind}_proj.weight"]
                    for kind in ("gate", "up", "down")
                }
                for expert in range(experts)
            ]
            dtype, (inner, hidden), _ = parts[0]["gate"]
            result[f"{prefix}.gate_up_proj"] = Tensor(
                dtype,
                (experts, 2 * inner, hidden),
                b"".join(part["gate"].data + part["up"].data for part in parts),
            )
            result[f"{prefix}.down_proj"] = Tensor(
                dtype, (experts, hidden, inner), b"".join(part["down"].data for part in parts)
            )
        return result


def make(family: str, *, dtype: str = "BF16", seed: int = 0, **changes: Any) -> Model:
    """A random model of a family; `changes` are to its config. A key changed to ... is left out."""
    known = {key: value for key, value in DEFAULTS[family].items() if value is not None}
    nulls = {key: None for key in DEFAULTS[family] if key.endswith(("_id", "scaling", "window"))}
    config = {**nulls, **known, **_SIZES, **_OURS[family], **changes}
    rng = np.random.default_rng(seed)
    tensors = {name: random_tensor(rng, dtype, shape) for name, shape in shapes(family, config)}
    config = {key: value for key, value in config.items() if value is not ...}
    return Model(family, config, tensors)


def random_tensor(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Small random values, all of them finite."""
    values = rng.normal(0, 0.1, shape).astype(np.float32)
    if dtype == "BF16":
        return Tensor(dtype, shape, (values.view(np.uint32) >> 16).astype("<u2").tobytes())
    kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
    return Tensor(dtype, shape, values.astype(kind).tobytes())


def moe_layers(config: dict[str, Any]) -> list[int]:
    """The layers that have experts."""
    if "num_experts" not in config:
        return []
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"]
    layers = range(config["num_hidden_layers"])
    return [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]


def shapes(family: str, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a model and its shape, as transformers names them."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    has_norm_bias = family == "starcoder2"
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from _norm(f"{prefix}input_layernorm", hidden, has_norm_bias)
        yield from _attention(f"{prefix}self_attn.", family, config)
        yield from _norm(f"{prefix}post_attention_layernorm", hidden, has_norm_bias)
        if layer in moe_layers(config):
            yield from _experts(f"{prefix}mlp.", config)
        else:
            yield from _mlp(f"{prefix}mlp.", family, config)
    yield from _norm("model.norm", hidden, has_norm_bias)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _norm(name: str, size: int, has_bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size,)
    if has_bias:
        yield f"{name}.bias", (size,)


def _attention(
    prefix: str, family: str, config: dict[str, Any]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_rows = config["num_key_value_heads"] * head_dim
    has_all = config.get("attention_bias") is True or config.get("use_bias") is True
    has_qkv = has_all or family == "qwen2" or config.get("qkv_bias") is True
    for name, rows, columns, has_bias in (
        ("q_proj", heads * head_dim, hidden, has_qkv),
        ("k_proj", kv_rows, hidden, has_qkv),
        ("v_proj", kv_rows, hidden, has_qkv),
        ("o_proj", hidden, heads * head_dim, has_all),
    ):
        yield f"{prefix}{name}.weight", (rows, columns)
        if has_bias:
            yield f"{prefix}{name}.bias", (rows,)


def _mlp(prefix: str, family: str, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if family == "starcoder2":
        for name, rows, columns in (("c_fc", inner, hidden), ("c_proj", hidden, inner)):
            yield f"{prefix}{name}.weight", (rows, columns)
            if config["use_bias"]:
                yield f"{prefix}{name}.bias", (rows,)
        return
    yield from _gated(prefix, hidden, inner, config.get("mlp_bias") is True)


def _gated(
    prefix: str, hidden: int, inner: int, has_bias: bool = False
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, rows, columns in (
        ("gate_proj", inner, hidden),
        ("up_proj", inner, hidden),
        ("down_proj", hidden, inner),
    ):
        yield f"{prefix}{name}.weight", (rows, columns)
        if has_bias:
            yield f"{prefix}{name}.bias", (rows,)


def _experts(prefix: str, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config["hidden_size"]
    yield f"{prefix}gate.weight", (config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        yield from _gated(f"{prefix}experts.{expert}.", hidden, config["moe_intermediate_size"])
    yield from _gated(f"{prefix}shared_expert.", hidden, config["shared_expert_intermediate_size"])
    yield f"{prefix}shared_expert_gate.weight", (1, hidden)


def write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def safetensors_bytes(
    tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str] | None = None
) -> bytes:
    """A file's contents."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = bytearray()
    for name, (dtype, shape, data) in tensors:
        assert len(data) == math.prod(shape) * ITEMSIZE.get(dtype, 1), name
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + body


def save_tensors(root: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Deals tensors out to so many files, with an index where they are several."""
    if shards == 1:
        data = safetensors_bytes(tensors.items(), {"format": "pt"})
        (root / "model.safetensors").write_bytes(data)
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = list(tensors.items())[number::shards]
        (root / name).write_bytes(safetensors_bytes(part, {"format": "pt"}))
        weight_map.update((tensor, name) for tensor, _ in part)
    total = sum(len(tensor.data) for tensor in tensors.values())
    write_json(
        root / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors and the metadata of a file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = Tensor(
            entry["dtype"], tuple(entry["shape"]), data[start + begin : start + end]
        )
    return tensors, metadata


def read_tensors(root: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face checkpoint, found through its index where it has one."""
    index = root / "model.safetensors.index.json"
    if not index.is_file():
        return read_file(root / "model.safetensors")[0]
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {name: read_file(root / name)[0] for name in set(weight_map.values())}
    assert {path.name for path in root.glob("*.safetensors")} == set(files)
    assert sum(map(len, files.values())) == len(weight_map)
    return {tensor: files[name][tensor] for tensor, name in weight_map.items()}
