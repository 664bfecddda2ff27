"""What each rank runs in test_dcp.py: torch's own dcp.save and dcp.load, over gloo.

`python -m tests.checkpoints.dcp_ranks ROOT`: the tensors of ROOT/hf/model.safetensors are saved as
FSDP2 and as tensor parallelism hold them, and the folders of ROOT that we wrote are loaded into a
model that FSDP2 shards.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

# Which dimension tensor parallelism cuts, by the end of a name.
COLUMNS = ("o_proj.weight", "down_proj.weight", "wo.weight", "w2.weight")
WHOLE = ("norm.weight", "layernorm.weight")


def model_of(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A tree of modules that has these parameters, and computes nothing."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        place = root
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(leaf, nn.Parameter(tensor.clone()))
    return root


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for name, layer in model.named_modules():
        if name.rpartition(".")[2].isdigit():
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def save_fsdp(root: Path, tensors: Mapping[str, torch.Tensor], mesh: DeviceMesh) -> None:
    """A model and its optimizer after a step that changes nothing."""
    model = shard(model_of(tensors), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "step": 3,
    }
    dcp.save(state, checkpoint_id=root / "fsdp")


def save_tp(root: Path, tensors: Mapping[str, torch.Tensor], mesh: DeviceMesh) -> None:
    """As tensor parallelism cuts them, and as FSDP2 does beside it where there are enough ranks."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        dim = 1 if name.endswith(COLUMNS) else 0
        cut = Replicate() if name.endswith(WHOLE) else Shard(dim)
        # What FSDP2 shards beside it is the first dimension.
        placements = [cut] if mesh.ndim == 1 else [Shard(1 - dim) if tensor.ndim > 1 else cut, cut]
        state[name] = distribute_tensor(tensor, mesh, placements)
    dcp.save(state, checkpoint_id=root / "tp")


def load(root: Path, tensors: Mapping[str, torch.Tensor], mesh: DeviceMesh) -> None:
    """Holds what dcp.load makes of a folder of ours to the tensors."""
    model = shard(model_of({name: torch.zeros_like(t) for name, t in tensors.items()}), mesh)
    state = get_model_state_dict(model)
    assert any(isinstance(each, DTensor) for each in state.values())
    dcp.load(state, checkpoint_id=root)
    for name, tensor in tensors.items():
        found = state[name]
        assert isinstance(found, DTensor)
        assert torch.equal(found.full_tensor(), tensor), f"{root}: {name}"


def in_torchtitan(
    tensors: Mapping[str, torch.Tensor], heads: int, kv_heads: int
) -> dict[str, torch.Tensor]:
    """The tensors by the names, and in the order of rows, that torchtitan has them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        for ours, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if ours in name:
                rows, columns = tensor.shape
                halves = tensor.view(count, 2, rows // count // 2, columns)
                tensor = halves.transpose(1, 2).reshape(rows, columns).contiguous()
        new = name.removeprefix("model.")
        for old, other in (
            ("embed_tokens", "tok_embeddings"),
            *((f"self_attn.{each}_proj", f"attention.qkv_linear.w{each}") for each in "qkv"),
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            new = new.replace(old, other)
        found[new] = tensor
    return found


def main(root: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = load_file(root / "hf" / "model.safetensors")
    titan = in_torchtitan(tensors, 4, 2)
    save_fsdp(root, tensors, mesh)
    save_tp(root, titan, mesh)
    load(root / "ours", tensors, mesh)
    load(root / "ours-torchtitan", titan, mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
