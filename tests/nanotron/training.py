"""A few training steps of a small model of the installed Nanotron, without its trainer.

Every rank fills its shards from the same whole tensors and reads the same batches, so that runs at
different topologies are the same training. What comes out is whole again: `merge` puts the ranks'
gradients and parameters together by the slices that Nanotron itself keeps with each shard.
"""

from __future__ import annotations

import os
import socket
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEQUENCE, BATCH, VOCABULARY = 16, 2, 128
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
# family -> module, configuration, model, and what the configuration says beside SIZES.
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaConfig", "LlamaForTraining", {}),
    "qwen2": ("qwen", "Qwen2Config", "Qwen2ForTraining", {"attention_bias": True}),
}
# Operation of the drop-in -> where its replacement calls which kernel.
KERNELS = {
    "cross_entropy": ("loss", "vocab_parallel_cross_entropy"),
    "rms_norm": ("norm", "rms_norm"),
    "glu": ("mlp", "glu"),
    "rope": ("attention", "rope_qkv"),
    "attention": ("attention", "attention"),
    "linear": ("linear", "column_linear"),
    "embedding": ("embedding", "vocab_parallel_embedding"),
}


@dataclass(frozen=True)
class Case:
    """What to train, as a word on a command line: family=llama,mode=ALL_REDUCE,..."""

    family: str = "llama"
    mode: str = "ALL_REDUCE"
    is_async: bool = False
    dtype: str = "float32"
    steps: int = 3
    learning_rate: float = 0.5
    ops: str = ""  # of the drop-in, with pluses between them; empty: it is off

    @property
    def word(self) -> str:
        return ",".join(f"{name}={value}" for name, value in asdict(self).items())

    @classmethod
    def from_word(cls, word: str) -> Case:
        given = dict(part.split("=") for part in word.split(","))
        return cls(
            family=given["family"],
            mode=given["mode"],
            is_async=given["is_async"] == "True",
            dtype=given["dtype"],
            steps=int(given["steps"]),
            learning_rate=float(given["learning_rate"]),
            ops=given["ops"],
        )


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def join_environment(port: int) -> None:
    """What torchrun says to a rank beyond what `run_ranks` says."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=os.environ["RANK"])


def start(port: int) -> Any:
    """Nanotron's ParallelContext over all ranks, by its own initialisation of torch.distributed."""
    from nanotron.parallel import ParallelContext

    join_environment(port)
    return ParallelContext(
        tensor_parallel_size=int(os.environ["WORLD_SIZE"]),
        pipeline_parallel_size=1,
        data_parallel_size=1,
    )


def build(case: Case, context: Any, **overrides: Any) -> Any:
    """The model with its weights, ties marked as the trainer marks them."""
    import nanotron.config
    from nanotron.config import ParallelismArgs
    from nanotron.models import build_model
    from nanotron.parallel.tensor_parallel.nn import TensorParallelLinearMode
    from nanotron.trainer import mark_tied_parameters

    module_name, config_name, model_name, more = FAMILIES[case.family]
    module = __import__(f"nanotron.models.{module_name}", fromlist=[model_name])
    parallel = ParallelismArgs(
        dp=1,
        pp=1,
        tp=context.tensor_parallel_size,
        tp_mode=TensorParallelLinearMode[case.mode],
        tp_linear_async_communication=case.is_async,
    )
    config = getattr(nanotron.config, config_name)(**SIZES, **more, **overrides)
    model = build_model(
        model_builder=lambda: getattr(module, model_name)(
            config=config, parallel_context=context, parallel_config=parallel
        ),
        parallel_context=context,
        dtype=getattr(torch, case.dtype),
    )
    mark_tied_parameters(model, context, parallel)
    for name, parameter in model.named_parameters():
        fill(name, parameter)
    return model


def slices_of(parameter: Any) -> tuple[tuple[int, ...], list[tuple[Any, Any]]]:
    """Shape of the whole tensor, and which part of it each part of this shard is."""
    if not parameter.is_sharded:
        return tuple(parameter.shape), [((...,), (...,))]
    info = parameter.get_sharded_info()
    pairs = [(pair.local_slices, pair.global_slices) for pair in info.local_global_slices_pairs]
    return tuple(info.unsharded_shape), pairs


@torch.no_grad()
def fill(name: str, parameter: Any) -> None:
    """From a whole tensor that depends on the name alone."""
    shape, pairs = slices_of(parameter)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.randn(shape, generator=generator) * 0.1
    if parameter.dim() == 1 and name.endswith("weight"):  # of a norm
        whole += 1
    for local, part in pairs:
        parameter[local] = whole[part].to(parameter.dtype)


def batch(family: str, step: int) -> dict[str, Tensor]:
    """On 'cuda', where Nanotron's data loaders put it."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
    given = {
        "input_ids": tokens[:, :-1],
        "label_ids": tokens[:, 1:],
        "label_mask": torch.rand(BATCH, SEQUENCE, generator=generator) < 0.9,
    }
    if family == "llama":
        given["input_mask"] = torch.ones(BATCH, SEQUENCE, dtype=torch.bool)
    else:  # two documents to a row
        given["position_ids"] = torch.cat((torch.arange(10), torch.arange(6))).repeat(BATCH, 1)
    return {name: tensor.contiguous().to("cuda") for name, tensor in given.items()}


def train(case: Case, context: Any) -> dict[str, Any]:
    """Losses, the first step's gradients, the last parameters, and how the shards fit together."""
    from nanotron.parallel.tied_parameters import sync_tied_weights_gradients

    model = build(case, context)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.learning_rate)
    named = dict(model.named_parameters())
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(case.steps):
        optimizer.zero_grad()
        loss = model(**batch(case.family, step % 2))["loss"]
        loss.backward()
        sync_tied_weights_gradients(model, context, grad_accumulator=None)
        gradients = gradients or {name: each.grad.clone() for name, each in named.items()}
        optimizer.step()
        losses.append(loss.item())
    return {
        "losses": losses,
        "gradients": gradients,
        "parameters": {name: each.detach().clone() for name, each in named.items()},
        "slices": {name: slices_of(each) for name, each in named.items()},
    }


def path_of(folder: Path, case: Case, rank: int) -> Path:
    return folder / f"{case.word}-{rank}.pt"


def merge(folder: Path, case: Case, size: int) -> dict[str, Any]:
    """What the ranks of a run saved, in whole tensors. All ranks must have the same losses."""
    ranks = [torch.load(path_of(folder, case, i), weights_only=False) for i in range(size)]
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks), [r["losses"] for r in ranks]
    merged: dict[str, Any] = {"losses": ranks[0]["losses"], "calls": ranks[0]["calls"]}
    for kind in ("gradients", "parameters"):
        merged[kind] = {}
        for name, (shape, _) in ranks[0]["slices"].items():
            whole = torch.full(shape, float("nan"))
            for rank in ranks:
                for local, part in rank["slices"][name][1]:
                    whole[part] = rank[kind][name][local].float()
            assert not whole.isnan().any(), f"{kind} of {name} are not whole"
            merged[kind][name] = whole
    return merged
