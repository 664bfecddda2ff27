"""Times load_into beside safetensors and torch operations.

Every variant fills the same tensors of one rank, in this process. What counts is the ratio to
`safetensors.torch.load_file` and torch operations in the same round; its median is shown. A case is
timed only after every variant left the same bytes. Cold means that the files were put out of the
page cache before each run; warm files were last read from the disk, not just written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import models
import torch
from bench_convert import RESULTS, environment
from safetensors import safe_open
from safetensors.torch import load_file

import nanotron_fast as nf
from nanotron_fast.families import family_of_config
from nanotron_fast.families.hf_config import read_config
from nanotron_fast.moves.dtypes import Dtype

Tensors = dict[str, torch.Tensor]
EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"


def names_of(num_layers: int) -> dict[str, tuple[tuple[str, ...], int | None]]:
    """What makes each Nanotron parameter of a llama, and the dimension that is split over ranks."""
    table: dict[str, tuple[tuple[str, ...], int | None]] = {
        EMBEDDING: (("model.embed_tokens.weight",), 0),
        "model.final_layer_norm.pp_block.weight": (("model.norm.weight",), None),
        "model.lm_head.pp_block.weight": (("lm_head.weight",), 0),
    }
    for layer in range(num_layers):
        to, of = f"model.decoder.{layer}.pp_block.", f"model.layers.{layer}."
        qkv = tuple(f"{of}self_attn.{name}_proj.weight" for name in "qkv")
        gate_up = tuple(f"{of}mlp.{name}_proj.weight" for name in ("gate", "up"))
        table |= {
            f"{to}attn.qkv_proj.weight": (qkv, 0),
            f"{to}attn.o_proj.weight": ((f"{of}self_attn.o_proj.weight",), 1),
            f"{to}mlp.gate_up_proj.weight": (gate_up, 0),
            f"{to}mlp.down_proj.weight": ((f"{of}mlp.down_proj.weight",), 1),
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table[f"{to}{norm}.weight"] = ((f"{of}{norm}.weight",), None)
    return table


def fill(target: torch.Tensor, parts: list[torch.Tensor], split: int | None) -> None:
    """Copies shards one above the other; on a GPU each is packed there."""
    row = 0
    for part in parts:
        rows = part.shape[0] if split == 0 else target.shape[0]
        target[row : row + rows].copy_(part)
        row += rows


def load_whole(tensors: Tensors, root: Path, tp: int, rank: int) -> None:
    """Every tensor of every file, and the rank's slices of them."""
    found: Tensors = {}
    for path in sorted(root.glob("*.safetensors")):
        found |= load_file(path, device=str(next(iter(tensors.values())).device))
    for name, (parts, split) in names_of(num_layers(tensors)).items():
        pieces = [found[part] for part in parts]
        if split is not None:
            pieces = [piece.chunk(tp, split)[rank] for piece in pieces]
        fill(tensors[name], pieces, split)


def load_slices(tensors: Tensors, root: Path, tp: int, rank: int) -> None:
    """The rank's slices alone, as somebody who knows safe_open would write it."""
    device = str(next(iter(tensors.values())).device)
    files = {}
    for path in sorted(root.glob("*.safetensors")):
        file = safe_open(path, framework="pt", device=device)
        files |= dict.fromkeys(file.keys(), file)
    for name, (parts, split) in names_of(num_layers(tensors)).items():
        pieces = []
        for part in parts:
            view = files[part].get_slice(part)
            bounds = slice(None)
            if split is not None:
                share = view.get_shape()[split] // tp
                bounds = slice(rank * share, (rank + 1) * share)
            pieces.append(view[:, bounds] if split == 1 else view[bounds])
        fill(tensors[name], pieces, split)


def load_ours(tensors: Tensors, root: Path, tp: int, rank: int) -> None:
    nf.load_into(tensors, root, topology=nf.Topology(tp=tp), rank=rank)


VARIANTS: dict[str, Callable[[Tensors, Path, int, int], None]] = {
    "load_file + torch": load_whole,
    "safe_open slices + torch": load_slices,
    "nanotron_fast.load_into": load_ours,
}


def num_layers(tensors: Tensors) -> int:
    return sum(name.endswith("attn.o_proj.weight") for name in tensors)


def tensors_of(root: Path, tp: int, dtype: torch.dtype, device: str) -> Tensors:
    """Empty tensors of a rank."""
    config = json.loads((root / "config.json").read_text())
    family = family_of_config(config)
    return {
        param.name: torch.empty(param.local_shape({"tp": tp}), dtype=dtype, device=device)
        for param in family.params(read_config(family, config))
    }


def evict(root: Path) -> None:
    """Puts a checkpoint out of the page cache."""
    os.sync()
    for path in root.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(load: Callable[..., None], tensors: Tensors, *args: object) -> float:
    """Seconds of one load, until all of it is on the device."""
    started = time.perf_counter()
    load(tensors, *args)
    if next(iter(tensors.values())).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(
    title: str, root: Path, tp: int, device: str, rounds: int, *, is_cold: bool
) -> dict[str, object]:
    """All variants of a case, correct first, then interleaved."""
    rank = tp // 2
    tensors = tensors_of(root, tp, torch.bfloat16, device)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    expected: Tensors = {}
    evict(root)
    for name, load in VARIANTS.items():
        for tensor in tensors.values():
            tensor.fill_(float("nan"))
        run(load, tensors, root, tp, rank)
        expected = expected or {key: tensor.clone() for key, tensor in tensors.items()}
        if not all(torch.equal(tensors[key], tensor) for key, tensor in expected.items()):
            sys.exit(f"{title}: {name} left something else; no time is shown")
    del expected
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, load in VARIANTS.items():
            if is_cold:
                evict(root)
            seconds[name].append(run(load, tensors, root, tp, rank))
    anchor = next(iter(seconds.values()))
    rows = [
        {
            "name": name,
            "seconds": times,
            "median_seconds": statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(times, anchor, strict=True)),
            "gigabytes_per_second": num_bytes / 1e9 / statistics.median(times),
        }
        for name, times in seconds.items()
    ]
    spread = max(anchor) / min(anchor)
    return {"title": title, "tensor_bytes": num_bytes, "anchor_spread": spread, "variants": rows}


def show(result: dict[str, object]) -> None:
    print(f"\n{result['title']}   ({result['tensor_bytes'] / 1e6:.0f} MB of tensors)")
    print(f"  {'':28}{'median s':>10}{'ratio':>8}{'GB/s':>7}")
    for row in result["variants"]:
        print(
            f"  {row['name']:28}{row['median_seconds']:10.3f}{row['ratio']:7.2f}x"
            f"{row['gigabytes_per_second']:7.1f}"
        )
    if result["anchor_spread"] > 2:
        print(f"  the anchor itself varied {result['anchor_spread']:.1f}-fold: a noisy batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="llama-1.1b-8kv", choices=[*models.SHAPES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--directory", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/load.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="nanotron_fast-bench-") as folder:
        hf, wide = Path(folder, "hf"), Path(folder, "hf-fp32")
        models.make_model(hf, args.shape, num_shards=4)
        models.make_model(wide, args.shape, dtype=Dtype.F32, num_shards=4)
        found = environment() | {"torch": torch.__version__, "device": args.device}
        if args.device.startswith("cuda"):
            found["device"] = torch.cuda.get_device_name(args.device)
        print(", ".join(f"{key} {value}" for key, value in found.items()))
        tp = 8 if models.SHAPES[args.shape]["num_key_value_heads"] == 8 else 4
        results = []
        for title, root, ranks, is_cold in (
            (f"{args.shape}, all of it", hf, 1, False),
            (f"{args.shape}, all of it, cold", hf, 1, True),
            (f"{args.shape}, one rank of {tp}", hf, tp, False),
            (f"{args.shape}, one rank of {tp}, cold", hf, tp, True),
            (f"{args.shape} in fp32, one rank of {tp} in bf16", wide, tp, False),
        ):
            case = root, ranks, args.device, args.rounds
            results.append(measure(title, *case, is_cold=is_cold))
            show(results[-1])
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        document = {
            "environment": found,
            "rounds": args.rounds,
            "cases": results,
        }
        (RESULTS / "load.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
