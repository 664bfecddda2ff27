"""A 70B model is planned from headers alone: the files here are holes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from nanotron_fast.formats.huggingface.checkpoint import layout_shards
from nanotron_fast.moves.dtypes import Dtype

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP, VOCAB = 8192, 80, 64, 8, 28672, 32000
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": MLP,
    "vocab_size": VOCAB,
}


@pytest.fixture
def llama_70b(tmp_path: Path) -> Path:
    root = tmp_path / "hf"
    root.mkdir()
    (root / "config.json").write_text(json.dumps(CONFIG))
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": (kv, HIDDEN),
            prefix + "self_attn.v_proj.weight": (kv, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "mlp.gate_proj.weight": (MLP, HIDDEN),
            prefix + "mlp.up_proj.weight": (MLP, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, MLP),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    tensors = [(name, Dtype.BF16, shape) for name, shape in shapes.items()]
    files, index = layout_shards(tensors, 10 * 10**9)
    assert index is not None
    (root / "model.safetensors.index.json").write_bytes(index)
    for file in files:
        with open(root / file.name, "wb") as out:
            out.write(file.header)
            out.truncate(file.size_bytes)
    assert sum(math.prod(shape) for shape in shapes.values()) == 68_976_648_192
    return root


def test_a_70b_is_planned_in_little_memory(llama_70b: Path, tmp_path: Path) -> None:
    code = (
        "import json, nanotron_fast as nf\n"
        "from nanotron_fast.checkpoints.plan.plan import peak_resident_bytes\n"
        f"plan = nf.plan({str(llama_70b)!r}, {str(tmp_path / 'out')!r},"
        " topology=nf.Topology(tp=8, pp=4))\n"
        "print(json.dumps({**plan.to_json(8), 'planned_in': peak_resident_bytes()}))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    plan = json.loads(result.stdout)
    assert plan["num_parameters"] == 68_976_648_192
    assert plan["tensor_files"] == 8 * (80 * 4 + 2) + 80 * 2 + 1
    assert plan["bytes_read"] == 2 * plan["num_parameters"]
    assert plan["planned_in"] < 300e6
    assert plan["peak_memory_bytes"] < 300e6
    stages = plan["layer_stages"]
    assert [stages.count(stage) for stage in range(4)] == [21, 20, 20, 19]
    assert stages == sorted(stages)
