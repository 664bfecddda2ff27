"""What an expert would write in an afternoon: a llama, either way, with safetensors and torch.

    python torch_baseline.py to-nanotron SRC DST TP        python torch_baseline.py to-hf SRC DST

No configs, no checks, one tensor in memory at a time where it can be: the fairest opponent.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LAYER, BLOCK = "model.layers.{}.", "model.decoder.{}.pp_block."
EMBED = "model.token_position_embeddings.pp_block.token_embedding.weight"
ENDS = {"model.embed_tokens.weight": EMBED, "lm_head.weight": "model.lm_head.pp_block.weight"}
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
FUSED = {
    "attn.qkv_proj.weight": [f"self_attn.{name}_proj.weight" for name in "qkv"],
    "mlp.gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
}
ROWS = {
    "attn.o_proj.weight": "self_attn.o_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}


def to_nanotron(src: Path, dst: Path, tp: int) -> None:
    files = [safe_open(path, framework="pt") for path in sorted(src.glob("*.safetensors"))]
    get = {name: file.get_tensor for file in files for name in file.keys()}  # noqa: SIM118

    def save(name: str, shards: list[torch.Tensor], replicated: bool = False) -> None:
        *folders, leaf = name.split(".")
        folder = dst.joinpath("model", *folders)
        folder.mkdir(parents=True, exist_ok=True)
        for rank, shard in enumerate(shards):
            suffix = "" if replicated else f"_pp-rank-0-of-1_tp-rank-{rank}-of-{tp}"
            save_file(
                {"data": shard.contiguous()}, folder / f"model_{leaf}{suffix}.safetensors", {}
            )

    for hf, name in ENDS.items():
        save(name, list(get[hf](hf).chunk(tp)))
    norm = "model.norm.weight"
    save("model.final_layer_norm.pp_block.weight", [get[norm](norm)], replicated=True)
    for layer in range(json.loads((src / "config.json").read_text())["num_hidden_layers"]):
        hf, block = LAYER.format(layer), BLOCK.format(layer)
        for name in NORMS:
            save(block + name, [get[hf + name](hf + name)], replicated=True)
        for name, parts in FUSED.items():
            chunks = [get[hf + part](hf + part).chunk(tp) for part in parts]
            save(block + name, [torch.cat([chunk[rank] for chunk in chunks]) for rank in range(tp)])
        for name, part in ROWS.items():
            save(block + name, list(get[hf + part](hf + part).chunk(tp, dim=1)))


def to_hf(src: Path, dst: Path) -> None:
    config = json.loads((src / "model_config.json").read_text())

    def load(name: str) -> list[torch.Tensor]:
        *folders, leaf = name.split(".")
        paths = sorted(src.joinpath("model", *folders).glob(f"model_{leaf}*.safetensors"))
        return [safe_open(path, framework="pt").get_tensor("data") for path in paths]

    tensors = {hf: torch.cat(load(name)) for hf, name in ENDS.items()}
    tensors["model.norm.weight"] = load("model.final_layer_norm.pp_block.weight")[0]
    head = config["hidden_size"] // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = {"attn.qkv_proj.weight": [q, kv, kv]}
    for layer in range(config["num_hidden_layers"]):
        hf, block = LAYER.format(layer), BLOCK.format(layer)
        tensors.update({hf + name: load(block + name)[0] for name in NORMS})
        for name, parts in FUSED.items():
            chunks = sizes.get(name, [config["intermediate_size"]] * 2)
            shards = load(block + name)
            split = [shard.split([size // len(shards) for size in chunks]) for shard in shards]
            for index, part in enumerate(parts):
                tensors[hf + part] = torch.cat([shard[index] for shard in split])
        tensors.update({hf + part: torch.cat(load(block + name), 1) for name, part in ROWS.items()})
    dst.mkdir(parents=True)
    save_file(tensors, dst / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    way, src, dst, *rest = sys.argv[1:]
    if way == "to-nanotron":
        to_nanotron(Path(src), Path(dst), int(rest[0]))
    else:
        to_hf(Path(src), Path(dst))
