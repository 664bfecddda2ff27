"""Two ranks of real Nanotron on the CPU that save and load weights, its way and ours.

`python -m tests.nanotron.checkpoint_ranks FOLDER PORT`. The two ranks are two shards, two stages or
two replicas of a model in turn. A folder is called FAMILY-DTYPE-GRID-WHO, by who has saved it.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

import nanotron_fast as nf
from nanotron_fast.patch.cpu import cpu_mode
from nanotron_fast.patch.importing import import_nanotron
from nanotron_fast.patch.nanotron.replacements import checkpoints
from nanotron_fast.patch.nanotron.targets import DropInOptions
from tests.nanotron.installed import has_qwen2
from tests.nanotron.training import SIZES, fill, join_environment
from tests.parallel.ranks import run_cases

# Sizes along tensor, pipeline and data parallelism.
GRIDS = {"tp": (2, 1, 1), "pp": (1, 2, 1), "dp": (1, 1, 2)}
# family -> module, configuration, model and what the configuration says.
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaConfig", "LlamaForTraining", SIZES),
    "tied": ("llama", "LlamaConfig", "LlamaForTraining", {**SIZES, "tie_word_embeddings": True}),
    "starcoder2": (
        "starcoder2",
        "Starcoder2Config",
        "Starcoder2ForTraining",
        {
            **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
            "grouped_query": True,
            "num_kv_heads": 2,
        },
    ),
    "qwen2": ("qwen", "Qwen2Config", "Qwen2ForTraining", {**SIZES, "attention_bias": True}),
    "moe": ("qwen", "Qwen2Config", "Qwen2ForTraining", SIZES),  # and what `build` adds
}
MOE_SIZES = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
BF16, FP32 = "bfloat16", "float32"


class Ranks:
    """The models of this process, one for each family, dtype and grid, and where they are saved."""

    def __init__(self, folder: Path) -> None:
        from nanotron.parallel import ParallelContext
        from nanotron.serialize import weights

        self.folder = folder
        self.contexts = {name: ParallelContext(*sizes) for name, sizes in GRIDS.items()}
        self.stock_save, self.stock_load = weights.save_weights, weights.load_weights
        self.save = checkpoints.save(_not_called, DropInOptions())
        self.load = checkpoints.load(_not_called, DropInOptions())
        self.models: dict[tuple[str, str, str], Any] = {}

    def model(self, family: str, dtype: str, grid: str) -> Any:
        key = (family, dtype, grid)
        if key not in self.models:
            self.models[key] = build(family, dtype, self.contexts[grid])
        refill(self.models[key])
        return self.models[key]

    def path(self, family: str, dtype: str, grid: str, who: str = "stock") -> Path:
        return self.folder / f"{family}-{dtype}-{grid}-{who}"


def _not_called(*args: Any) -> Any:
    raise AssertionError("what ours replaces was called")


def build(family: str, dtype: str, context: Any) -> Any:
    import nanotron.config
    from nanotron.config import ParallelismArgs
    from nanotron.models import build_model
    from nanotron.parallel.tensor_parallel.nn import TensorParallelLinearMode
    from nanotron.random import RandomStates, get_current_random_state
    from nanotron.trainer import mark_tied_parameters

    module_name, config_name, model_name, sizes = FAMILIES[family]
    module = __import__(f"nanotron.models.{module_name}", fromlist=[model_name])
    parallel = ParallelismArgs(
        dp=context.data_parallel_size,
        pp=context.pipeline_parallel_size,
        tp=context.tensor_parallel_size,
        tp_mode=TensorParallelLinearMode.ALL_REDUCE,
        tp_linear_async_communication=False,
    )
    more = {}
    if family == "starcoder2":
        more["random_states"] = RandomStates({"tp_synced": get_current_random_state()})
    if family == "moe":
        from nanotron.config.models_config import MoEConfig

        sizes = {**sizes, "moe_config": MoEConfig(num_experts=4, layers=[1], **MOE_SIZES)}
    config = getattr(nanotron.config, config_name)(**sizes)
    model = build_model(
        model_builder=lambda: getattr(module, model_name)(
            config=config, parallel_context=context, parallel_config=parallel, **more
        ),
        parallel_context=context,
        dtype=getattr(torch, dtype),
    )
    mark_tied_parameters(model, context, parallel)
    return model


def refill(model: Any) -> None:
    """Shards of the same whole tensors at every topology."""
    for name, parameter in model.named_parameters():
        fill(parameter.get_tied_info().name if parameter.is_tied else name, parameter)


def poison(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))


def loaded_by(load: Callable[..., Any], model: Any, *args: Any) -> tuple[dict[str, Tensor], Any]:
    poison(model)
    metadata = load(model, *args)
    return {name: each.clone() for name, each in model.state_dict().items()}, metadata


def check_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert not tensor.isnan().any(), name
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def save(ranks: Ranks, family: str, dtype: str, grid: str) -> None:
    """Ours writes the files that Nanotron writes, with the same in them."""
    model, context = ranks.model(family, dtype, grid), ranks.contexts[grid]
    theirs, ours = (ranks.path(family, dtype, grid, who) for who in ("stock", "ours"))
    ranks.stock_save(model, context, theirs)
    ranks.save(model, context, ours)
    dist.barrier()
    names = sorted(path.relative_to(theirs) for path in theirs.rglob("*"))
    assert sorted(path.relative_to(ours) for path in ours.rglob("*")) == names
    for name in names:
        if name.suffix:
            check_same_file(ours / name, theirs / name)


def check_same_file(ours: Path, theirs: Path) -> None:
    with safe_open(ours, "pt") as left, safe_open(theirs, "pt") as right:
        assert left.metadata() == right.metadata(), ours
        check_equal(
            {name: left.get_tensor(name) for name in left.keys()},  # noqa: SIM118
            {name: right.get_tensor(name) for name in right.keys()},  # noqa: SIM118
        )


def load(ranks: Ranks, family: str, dtypes: tuple[str, str], grids: tuple[str, str]) -> None:
    """What was saved at one grid is loaded at another, from the bytes of this rank's tensors."""
    context = ranks.contexts[grids[1]]
    model = ranks.model(family, dtypes[1], grids[1])
    root = ranks.path(family, dtypes[0], grids[0])
    theirs, their_metadata = loaded_by(ranks.stock_load, model, context, root)
    with mock.patch.object(checkpoints, "read_moves", Counter()) as counter:
        ours, our_metadata = loaded_by(ranks.load, model, context, root)
    check_equal(ours, theirs)
    assert our_metadata == their_metadata
    assert list(our_metadata) == list(their_metadata)
    stored, wanted = (getattr(torch, dtype).itemsize for dtype in dtypes)
    num_bytes = sum(each.nbytes for each in model.parameters())
    assert counter.bytes_read == num_bytes * stored // wanted


class Counter:
    """Of the bytes that ours reads of tensors."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.real = checkpoints.read_moves

    def __call__(self, *args: Any) -> int:
        self.bytes_read = self.real(*args)
        return self.bytes_read


def convert(ranks: Ranks, family: str, grid: str, who: str) -> None:
    """What was saved goes to Hugging Face and back, and Nanotron reads what comes back."""
    root = ranks.path(family, BF16, grid, who)
    there, back = root.with_name(f"{root.name}-hf"), root.with_name(f"{root.name}-back")
    model = ranks.model(family, BF16, grid)
    wanted = {name: each.clone() for name, each in model.state_dict().items()}
    if dist.get_rank() == 0:
        (root / "model_config.json").write_text(json.dumps(asdict(model.config)))
        nf.convert(root, there)
        assert nf.verify(root, there).equal
        tp, pp, _ = GRIDS[grid]
        old = {} if has_qwen2() else {"checkpoint_version": "1.2", "rope_interleaved": True}
        nf.convert(there, back, topology=nf.Topology(tp=tp, pp=pp), **old)
    dist.barrier()
    for load in (ranks.stock_load, ranks.load):
        found, _ = loaded_by(load, model, ranks.contexts[grid], back)
        check_equal(found, wanted)


def replica(ranks: Ranks) -> None:
    """One of two writes."""
    root = ranks.folder / f"replica-{dist.get_rank()}"
    ranks.save(ranks.model("llama", BF16, "dp"), ranks.contexts["dp"], root)
    assert root.exists() is (dist.get_rank() == 0)


def load_state_dict(ranks: Ranks) -> None:
    """Some tensors of one's own: those are filled, the model is not. One of them, as it is kept,
    is for Nanotron's own."""
    model, context = ranks.model("llama", BF16, "dp"), ranks.contexts["dp"]
    root = ranks.path("llama", BF16, "tp")
    poison(model)
    names = [name for name in model.state_dict() if "mlp" in name]
    for is_served in (True, False):
        original = mock.Mock(side_effect=ranks.stock_load)
        own = {name: torch.empty_like(model.get_parameter(name)) for name in names}
        if not is_served:
            own[names[0]] = own[names[0]].new_empty(own[names[0]].shape[::-1]).t()
        metadata = checkpoints.load(original, DropInOptions())(model, context, root, own)
        assert original.called is not is_served
        theirs = {name: torch.empty_like(model.get_parameter(name)) for name in names}
        assert metadata == ranks.stock_load(model, context, root, theirs)
        check_equal(own, theirs)
        assert all(parameter.isnan().all() for parameter in model.parameters())


def mixed_topologies(ranks: Ranks) -> None:
    """Shards that overlap: Nanotron lets some of them win, and so do we."""
    root = ranks.folder / f"mixed-{dist.get_rank()}"
    for grid in ("tp", "dp"):
        shutil.copytree(ranks.path("llama", BF16, grid), root, dirs_exist_ok=True)
    original = mock.Mock(side_effect=ranks.stock_load)
    model = ranks.model("llama", BF16, "pp")
    wanted = {name: each.clone() for name, each in model.state_dict().items()}
    load = checkpoints.load(original, DropInOptions())
    check_equal(loaded_by(load, model, ranks.contexts["pp"], root)[0], wanted)
    assert original.called


def not_contiguous(ranks: Ranks) -> None:
    """safetensors refuses it, and says so itself."""
    model = ranks.model("llama", BF16, "dp")
    parameter = next(iter(model.parameters()))
    kept = parameter.data
    parameter.data = parameter.data.t()
    try:
        with pytest.raises(ValueError, match="non contiguous"):
            checkpoints.save(ranks.stock_save, DropInOptions())(
                model, ranks.contexts["tp"], ranks.folder / "refused"
            )
    finally:
        parameter.data = kept


def disk_full(ranks: Ranks) -> None:
    """The kernel refuses all but small files: what is there is whole."""
    root = ranks.folder / "full"
    model = ranks.model("llama", BF16, "tp")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096 + 512, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            ranks.save(model, ranks.contexts["tp"], root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    stock = ranks.path("llama", BF16, "tp")
    for path in root.rglob("*.*"):
        check_same_file(path, stock / path.relative_to(root))


def refuse(ranks: Ranks, grid: str, harm: Callable[[Path], None], message: str) -> None:
    """A damaged copy of a TP=2 checkpoint: nothing is read, and the error names a file."""
    root = ranks.path("llama", BF16, "tp")
    copy = ranks.folder / f"harmed-{grid}-{harm.__name__}-{dist.get_rank()}"
    shutil.copytree(root, copy)
    harm(copy / "model")
    model = ranks.model("llama", BF16, grid)
    poison(model)
    with pytest.raises(ValueError, match=message) as caught:
        ranks.load(model, ranks.contexts[grid], copy)
    assert str(copy) in str(caught.value)
    assert all(parameter.isnan().all() for parameter in model.parameters())


_QKV = "model/decoder/0/pp_block/attn/qkv_proj"


def without_shards(root: Path) -> None:
    for path in (root / _QKV).iterdir():
        path.unlink()


def without_shard(root: Path) -> None:
    next((root / _QKV).glob("*tp-rank-1-of-2*")).unlink()


def without_norm(root: Path) -> None:
    (root / "model/decoder/1/pp_block/input_layernorm/model_weight.safetensors").unlink()


def without_folder(root: Path) -> None:
    without_shards(root)
    (root / _QKV).rmdir()


def truncated(root: Path) -> None:
    for path in (root / _QKV).iterdir():
        path.write_bytes(path.read_bytes()[:-2])


def from_the_future(root: Path) -> None:
    _claim(root, "9.0")


def of_two_versions(root: Path) -> None:
    _claim(root, "1.1")


def _claim(root: Path, version: str) -> None:
    for path in (root / _QKV).iterdir():
        with safe_open(path, "pt") as file:
            tensor, metadata = file.get_tensor("data"), file.metadata()
        harmed = checkpoints.File(path, path.with_suffix(".new"), tensor, metadata)
        harmed.metadata["version"] = version
        checkpoints.write_files([harmed])


def cases(folder: str, port: str) -> Iterator[tuple[str, Callable[[], None]]]:
    import_nanotron()
    join_environment(int(port))
    ranks = Ranks(Path(folder))
    families = ["llama", "tied", "starcoder2", *(["qwen2", "moe"] if has_qwen2() else [])]
    for family in families:
        for grid in GRIDS:
            yield f"save {family} {grid}", partial(save, ranks, family, BF16, grid)
    yield "save fp32", partial(save, ranks, "llama", FP32, "tp")
    for family in families:
        for saved in GRIDS:
            for grid in GRIDS:
                name = f"load {family} {saved} at {grid}"
                yield name, partial(load, ranks, family, (BF16, BF16), (saved, grid))
    for grid in ("tp", "dp"):
        yield f"narrow {grid}", partial(load, ranks, "llama", (FP32, BF16), ("tp", grid))
        yield f"widen {grid}", partial(load, ranks, "llama", (BF16, FP32), ("tp", grid))
    for family in ("llama", "tied"):
        for who in ("stock", "ours"):
            yield f"convert {family} {who}", partial(convert, ranks, family, "tp", who)
    yield "replica", partial(replica, ranks)
    yield "load a state dict", partial(load_state_dict, ranks)
    yield "mixed topologies", partial(mixed_topologies, ranks)
    yield "not contiguous", partial(not_contiguous, ranks)
    yield "disk full", partial(disk_full, ranks)
    for grid, harm, message in (
        ("dp", without_shard, "hold 1024 of the 2048 elements"),
        ("dp", without_shards, "nor another shard"),
        ("dp", without_folder, "no folder"),
        ("tp", without_folder, "no folder"),
        ("tp", without_norm, "not sharded"),
        ("tp", truncated, "truncated"),
        ("dp", truncated, "truncated"),
        ("dp", from_the_future, "Unsupported checkpoint version 9.0"),
        ("dp", of_two_versions, "several checkpoint versions"),
    ):
        yield f"{harm.__name__} {grid}", partial(refuse, ranks, grid, harm, message)


if __name__ == "__main__":
    with cpu_mode():
        run_cases(cases(*sys.argv[1:]))
