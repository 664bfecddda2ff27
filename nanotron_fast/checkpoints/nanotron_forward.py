"""What Nanotron computes from a checkpoint: its three model classes once more, in plain torch.

For comparing, not for speed. Everything is taken from `model_config.json` and from the tensors as
they lie on disk, put together by what their files say of themselves, without the tables that
conversion goes by: so a mistake in those shows here. The rules are those of nanotron/models at
2411b022 (llama.py, qwen.py, starcoder2.py, nn/moe.py), in fp32, on one document a row:

- rotary embedding turns neighbours where the configuration has `rope_interleaved`, else halves;
- stock Nanotron ignores `rope_scaling`; a checkpoint for `nanotron-fast` has it honoured, as this
  package's drop-in does with `rope_scaling=True`, and biases beside any of its matrices;
- a window of W shows a query its last W keys; a layer without rotary embedding has no window;
- experts: softmax over all of them, the top_k largest as they are, not made to sum to 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from nanotron_fast.checkpoints.activations import ACTIVATIONS
from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.stored import NanotronModel
from nanotron_fast.errors import CheckpointError, UnsupportedModelError
from nanotron_fast.formats.nanotron.checkpoint import TENSOR, NanotronCheckpoint
from nanotron_fast.formats.nanotron.slices import parse_metadata
from nanotron_fast.kernels.rope.tables import rope_frequencies
from nanotron_fast.model.spec import Attention, Experts


class NanotronForward:
    """A Nanotron checkpoint as a function of token ids. Parameters are read when they are used."""

    def __init__(self, checkpoint: NanotronCheckpoint, options: Options | None = None) -> None:
        """Raises CheckpointError, ConfigError, UnsupportedModelError."""
        model = NanotronModel(checkpoint, options or Options())
        self.checkpoint = checkpoint
        self.model_class = model.model_class
        self.spec = model.padded_spec
        self.vocab_size = model.spec.vocab_size
        self.is_interleaved = model.is_interleaved
        if not model.model_class.is_stock:
            raise UnsupportedModelError(
                f"{checkpoint.root}: a {model.model_class} is not Nanotron's"
            )
        honours_scaling = model.target == "nanotron-fast"
        self.scaling = model.spec.rope_scaling if honours_scaling else None
        self.act = ACTIVATIONS[self.spec.hidden_act]
        scaled = ", rope_scaling honoured" if self.scaling else ""
        # Who computes, for people.
        self.name = f"Nanotron's {self.model_class} in plain torch{scaled}"

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Token ids (batch, seq) to logits (batch, seq, vocabulary without padding) in fp32.

        Raises CheckpointError where a parameter is missing, OSError.
        """
        if self.spec.norm == "layer_norm":
            return self._starcoder2(input_ids)
        return self._llama(input_ids)

    # --- The parameters

    def _has(self, name: str) -> bool:
        return f"model.{name}" in self.checkpoint.params

    def _param(self, name: str) -> Tensor:
        """A whole parameter in fp32, its shards pasted where their metadata says."""
        shards = self.checkpoint.params.get(f"model.{name}")
        if shards is None:
            raise CheckpointError(f"{self.checkpoint.root}: model.{name} is missing")
        tensors = []
        for shard in shards:
            with safe_open(shard.path, "pt") as file:
                tensors.append(file.get_tensor(TENSOR).float())
        if f"model.{name}" not in self.checkpoint.sharded:
            return tensors[0]
        said = [parse_metadata(each.path, each.metadata, each.info.shape) for each in shards]
        whole = torch.full(said[0].whole_shape, math.nan)  # what no shard fills shows
        for shard, metadata, tensor in zip(shards, said, tensors, strict=True):
            if metadata.whole_shape != said[0].whole_shape:
                raise CheckpointError(
                    f"{shard.path}: it is a shard of a tensor of {list(metadata.whole_shape)}, and "
                    f"{shards[0].path.name} of {list(said[0].whole_shape)}"
                )
            for pair in metadata.pairs:
                whole[pair.whole] = tensor[pair.local]
        return whole

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self._param(f"{name}.bias") if self._has(f"{name}.bias") else None
        return F.linear(x, self._param(f"{name}.weight"), bias)

    # --- Attention

    def _turned(self, x: Tensor, attention: Attention) -> Tensor:
        """Rotary embedding of (batch, seq, heads, d), of those rows of a head that it turns."""
        if attention.rotary is None:
            return x
        first, end = attention.rotary
        frequencies, factor = rope_frequencies(
            end - first,
            self.spec.rope_theta,
            self.scaling,
            max_position_embeddings=self.spec.max_position_embeddings,
            seq_len=x.shape[1],
        )
        angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequencies.cpu())
        cos, sin = angles.cos()[:, None] * factor, angles.sin()[:, None] * factor
        before, part, after = x.split((first, end - first, x.shape[-1] - end), -1)
        if self.is_interleaved:
            a, b = part[..., ::2], part[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = part.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((before, turned, after), -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """(batch, seq, heads, d) each to (batch, seq, heads * d)."""
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        places = torch.arange(q.shape[1])
        distance = places[:, None] - places[None, :]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)

    # --- LlamaConfig and Qwen2Config

    def _rms_norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.norm_eps)
        return x * scale * self._param(f"{name}.weight")

    def _llama(self, input_ids: Tensor) -> Tensor:
        spec = self.spec
        embedding = self._param("token_position_embeddings.pp_block.token_embedding.weight")
        x = embedding[input_ids]
        for number, layer in enumerate(spec.layers):
            block = f"decoder.{number}.pp_block"
            normed = self._rms_norm(x, f"{block}.input_layernorm")
            x = x + self._llama_attention(normed, f"{block}.attn", layer.attention)
            normed = self._rms_norm(x, f"{block}.post_attention_layernorm")
            if isinstance(layer.mlp, Experts):
                x = x + self._experts(normed, f"{block}.mlp", layer.mlp)
            else:
                x = x + self._gated_mlp(normed, f"{block}.mlp")
        x = self._rms_norm(x, "final_layer_norm.pp_block")
        head = embedding if spec.tie_word_embeddings else self._param("lm_head.pp_block.weight")
        return F.linear(x, head[: self.vocab_size])

    def _llama_attention(self, x: Tensor, name: str, attention: Attention) -> Tensor:
        heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
        packed = self._linear(x, f"{name}.qkv_proj").unflatten(-1, (-1, attention.head_dim))
        q, k, v = packed.split(heads, -2)
        # Nanotron gives a layer without rotary embedding no window.
        has_window = attention.rotary is not None
        q, k = self._turned(q, attention), self._turned(k, attention)
        out = self._attend(q, k, v, attention.window if has_window else None)
        return self._linear(out, f"{name}.o_proj")

    def _gated_mlp(self, x: Tensor, name: str) -> Tensor:
        gate, up = self._linear(x, f"{name}.gate_up_proj").chunk(2, -1)
        return self._linear(self.act(gate) * up, f"{name}.down_proj")

    def _experts(self, x: Tensor, name: str, moe: Experts) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self._linear(tokens, f"{name}.router").softmax(-1).topk(moe.top_k, -1)
        gate_up = self._param(f"{name}.experts.merged_gate_up_proj")
        down = self._param(f"{name}.experts.merged_down_proj")
        out = torch.zeros_like(tokens)
        for expert in range(moe.num_experts):
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            gate, up = (tokens[rows] @ gate_up[expert]).chunk(2, -1)
            found = (self.act(gate) * up) @ down[expert]
            out.index_add_(0, rows, found * weights[rows, places, None])
        if moe.has_shared_expert:
            share = torch.sigmoid(self._linear(tokens, f"{name}.shared_expert_gate"))
            out = out + share * self._gated_mlp(tokens, f"{name}.shared_expert")
        return out.view_as(x)

    # --- Starcoder2Config

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._param(f"{name}.weight"), self._param(f"{name}.bias")
        return F.layer_norm(x, weight.shape, weight, bias, self.spec.norm_eps)

    def _starcoder2(self, input_ids: Tensor) -> Tensor:
        spec = self.spec
        embedding = self._param("token_embeddings.pp_block.token_embedding.weight")
        x = embedding[input_ids]
        for number, layer in enumerate(spec.layers):
            block, attention = f"decoder.{number}.pp_block", layer.attention
            groups = attention.num_heads // attention.num_kv_heads
            packed = self._linear(
                self._layer_norm(x, f"{block}.ln_1"), f"{block}.attn.query_key_value"
            )
            # Each key-value head with its queries before it.
            heads = packed.unflatten(-1, (attention.num_kv_heads, groups + 2, attention.head_dim))
            q, k, v = heads.split((groups, 1, 1), -2)
            q, k, v = (part.flatten(2, 3) for part in (q, k, v))
            q, k = self._turned(q, attention), self._turned(k, attention)
            out = self._attend(q, k, v, attention.window)
            x = x + self._linear(out, f"{block}.attn.dense")
            inner = self._linear(self._layer_norm(x, f"{block}.ln_2"), f"{block}.ff.c_fc")
            x = x + self._linear(self.act(inner), f"{block}.ff.c_proj")
        x = self._layer_norm(x, "final_layer_norm.pp_block")
        head = embedding if spec.tie_word_embeddings else self._param("lm_head.pp_block.weight")
        return F.linear(x, head[: self.vocab_size])
