"""load_into against slices of a full conversion, byte for byte; what it reads and refuses."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanotron_fast as nf
from nanotron_fast import _C, Topology
from nanotron_fast.checkpoints import load as loading
from nanotron_fast.checkpoints.load import load_into
from nanotron_fast.errors import CheckpointError, ConfigError, TopologyError, UnsupportedModelError
from nanotron_fast.formats.nanotron.checkpoint import read_nanotron
from nanotron_fast.formats.nanotron.classes import classes
from nanotron_fast.formats.nanotron.stages import Stages
from nanotron_fast.moves import numpy_engine as reference
from nanotron_fast.moves.move import table_of
from nanotron_fast.moves.row import FILL
from nanotron_fast.moves.staging import batches_of
from tests.modelzoo import Tensor, make
from tests.plans import builders, write_sources

EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
HEAD = "model.lm_head.pp_block.weight"
QKV = "model.decoder.0.pp_block.attn.qkv_proj.weight"
TP2, TP2_PP2, TP4 = Topology(tp=2), Topology(tp=2, pp=2), Topology(tp=4)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@pytest.fixture(params=["direct", "staged"])
def way(request, monkeypatch) -> str:
    """Reading to where bytes belong, as on a CPU; and all of it through staging, as on a GPU."""
    if request.param == "staged":
        monkeypatch.setattr(loading, "batches_of", all_staged)
    return request.param


def all_staged(moves, capacity, *, staging, reads_direct):
    assert reads_direct
    return batches_of(moves, capacity, staging=staging, reads_direct=False)


def save(tmp_path, family, *, stacked=False, **changes):
    return make(family, **changes).save(tmp_path / "hf", shards=3, is_stacked=stacked)


def converted(hf, tmp_path, topology, **options):
    """What each rank should hold, by a full conversion: a dict of tensors for each."""
    root = tmp_path / f"wanted-{topology.tp}-{topology.pp}"
    plan = nf.convert(hf, root, topology=topology, **options).plan
    (model_class,) = (each for each in classes() if each.name == plan.model_class)
    stages = Stages(plan.spec, model_class, topology)
    ranks = [{} for _ in range(topology.tp * topology.pp)]
    checkpoint = read_nanotron(root)
    for name, shards in checkpoint.params.items():
        stage = shards[0].pp_rank
        if name not in checkpoint.sharded:
            words = name.split(".")
            stage = stages.of(int(words[2]) if words[1] == "decoder" else "norm")
        for tp_rank in range(topology.tp):
            shard = shards[tp_rank % len(shards)]
            data = bytearray(shard.path.read_bytes()[shard.info.begin_bytes : shard.info.end_bytes])
            values = torch.frombuffer(data, dtype=DTYPES[shard.info.dtype])
            ranks[stage * topology.tp + tp_rank][name] = values.view(shard.info.shape)
    return root, ranks


def poisoned(wanted, device="cpu"):
    """Tensors of the same kind, whose every byte would show."""
    return {
        name: torch.full_like(tensor, float("nan"), device=device)
        for name, tensor in wanted.items()
    }


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        ours = found[name].detach().cpu()
        assert ours.dtype == tensor.dtype, name
        assert torch.equal(ours.view(torch.uint8), tensor.view(torch.uint8)), name


def check_ranks(ranks, source, topology, **options):
    for rank, wanted in enumerate(ranks):
        found = poisoned(wanted, options.get("device") or "cpu")
        report = load_into(found, source, topology=topology, rank=rank, **options)
        assert_equal(found, wanted)
        assert report.num_tensors == len(wanted)
        assert report.seconds > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_moe", "smollm3", "starcoder2"])
def test_every_rank_gets_its_slices(tmp_path, way, family) -> None:
    untied = {} if family == "starcoder2" else {"tie_word_embeddings": False}
    hf = save(tmp_path, family, stacked=way == "staged", **untied)
    _, ranks = converted(hf, tmp_path, TP2)
    check_ranks(ranks, hf, TP2, **({"staging_bytes": 5000} if way == "staged" else {}))
    if family == "starcoder2":
        return
    other, ranks_of_4 = converted(hf, tmp_path, TP4)
    check_ranks(ranks, other, TP2)
    both, ranks_of_both = converted(hf, tmp_path, TP2_PP2)
    check_ranks(ranks_of_both, other, TP2_PP2)
    check_ranks(ranks_of_4, both, TP4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stored", ["BF16", "F32"])
def test_values_are_cast_to_the_tensors_dtype(tmp_path, way, stored, dtype) -> None:
    hf = save(tmp_path, "llama", dtype=stored)
    _, ranks = converted(hf, tmp_path, TP2, dtype=dtype)
    check_ranks(ranks, hf, TP2)


def test_rotary_rows_change_their_order(tmp_path, way) -> None:
    hf = save(tmp_path, "qwen2")
    _, halves = converted(hf, tmp_path, TP2)
    pairs_root, pairs = converted(hf, tmp_path / "pairs", TP2, rope_interleaved=True)
    assert not torch.equal(halves[0][QKV], pairs[0][QKV])
    check_ranks(pairs, hf, TP2, rope_interleaved=True)
    check_ranks(pairs, pairs_root, TP2)
    check_ranks(halves, pairs_root, TP2, rope_interleaved=False)


def test_vocabularies_are_padded_and_cut(tmp_path, way) -> None:
    hf = save(tmp_path, "llama", vocab_size=150)
    root, ranks = converted(hf, tmp_path, TP4, pad_vocab_to_multiple_of=64)
    assert ranks[0][EMBEDDING].shape[0] == 48
    check_ranks(ranks, hf, TP4, pad_vocab_to_multiple_of=64)
    check_ranks(ranks, root, TP4)
    _, unpadded = converted(hf, tmp_path, TP2)
    check_ranks(unpadded, root, TP2, pad_vocab_to_multiple_of=1)
    with pytest.raises(TopologyError, match=r"150 rows of the vocabulary do not split over tp=4"):
        load_into(ranks[0], hf, topology=TP4, rank=0)


def test_tied_heads_are_filled_where_a_rank_has_them(tmp_path, way) -> None:
    hf = save(tmp_path, "llama", tie_word_embeddings=True)
    root, ranks = converted(hf, tmp_path, TP2_PP2)
    for rank in (2, 3):
        ranks[rank][HEAD] = ranks[rank - 2][EMBEDDING]
    check_ranks(ranks, hf, TP2_PP2)
    check_ranks(ranks, root, TP2_PP2)
    with pytest.raises(TopologyError, match=f"1 of its tensors are missing: {HEAD}"):
        load_into(_without(ranks[2], HEAD), hf, topology=TP2_PP2, rank=2)
    _, ranks = converted(hf, tmp_path, TP2)
    check_ranks(ranks, hf, TP2)
    ranks[1][HEAD] = ranks[1][EMBEDDING]
    found = poisoned(ranks[1])
    report = load_into(found, hf, topology=TP2, rank=1)
    assert_equal(found, ranks[1])
    shared = {**poisoned(ranks[1]), HEAD: None}
    shared[HEAD] = shared[EMBEDDING]
    once = load_into(shared, hf, topology=TP2, rank=1)
    assert_equal(shared, ranks[1])
    # Staged, both are made from the same bytes.
    twice = ranks[1][HEAD].numel() * 2 if way == "direct" else 0
    assert report.bytes_read == once.bytes_read + twice


def _without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


class Block(torch.nn.Module):
    """A module whose parameters have the names of a dict."""

    def __init__(self, tensors) -> None:
        super().__init__()
        for name, group in itertools.groupby(sorted(tensors), lambda name: name.partition(".")[0]):
            inner = {key.partition(".")[2]: tensors[key] for key in group}
            if "" in inner:
                self.register_parameter(name, torch.nn.Parameter(inner[""]))
            else:
                self.add_module(name, Block(inner))


def test_tensors_left_out_and_weights_that_are_there_twice(tmp_path) -> None:
    hf = make("llama", num_hidden_layers=1).save(tmp_path / "hf")
    _, (wanted,) = converted(hf, tmp_path, Topology())
    head = {"v_head.weight": Tensor("BF16", (2,), bytes(4))}
    make("llama", num_hidden_layers=1).save(hf, extra=head)
    found = poisoned(wanted)
    with pytest.raises(CheckpointError, match=r"v_head\.weight"):
        load_into(found, hf, topology=Topology(), rank=0)
    load_into(found, hf, topology=Topology(), rank=0, ignore_tensors=["v_head.*"])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    make("llama", num_hidden_layers=1, seed=1).save(hf, shards=2, extra=head)
    with pytest.raises(CheckpointError, match="the weights are there twice"):
        load_into(found, hf, topology=Topology(), rank=0, ignore_tensors=["v_head.*"])


def test_modules_are_filled_in_place(tmp_path) -> None:
    hf = save(tmp_path, "qwen2_moe")
    _, ranks = converted(hf, tmp_path, TP2)
    module = Block(poisoned(ranks[0]))
    versions = [parameter._version for parameter in module.parameters()]
    load_into(module, hf, topology=TP2, rank=0)
    assert_equal(dict(module.named_parameters()), ranks[0])
    # Whoever saved them for a backward pass is told.
    changed = [parameter._version for parameter in module.parameters()]
    assert all(new > old for new, old in zip(changed, versions, strict=True))


def bytes_of_process() -> int:
    """What this process has read so far, from caches too."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc")
def test_only_the_ranges_of_the_rank_are_read(tmp_path, way) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    hf = save(tmp_path, "llama", **sizes)
    root, ranks = converted(hf, tmp_path, TP4)
    needed = sum(tensor.numel() * 2 for tensor in ranks[3].values())
    whole = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    assert needed < whole / 3
    for source in (hf, root):
        headers = sum(_header_bytes(path) for path in source.rglob("*.safetensors"))
        found = poisoned(ranks[3])
        before = bytes_of_process()
        report = load_into(found, source, topology=TP4, rank=3)
        read = bytes_of_process() - before
        assert report.bytes_read == needed
        # Besides: configurations, and what Python itself reads when it first needs a module.
        assert needed <= read < needed + headers + 100_000
        assert headers + 100_000 < whole - needed
    wide = {name: tensor.float() for name, tensor in ranks[0].items()}
    assert load_into(wide, hf, topology=TP4, rank=0).bytes_read == needed


def _header_bytes(path) -> int:
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_progress_ends_with_all_and_stops_what_goes_on(tmp_path, way) -> None:
    hf = save(tmp_path, "llama")
    _, ranks = converted(hf, tmp_path, TP2, dtype="fp32")
    seen = []
    report = load_into(
        ranks[0], hf, topology=TP2, rank=0, staging_bytes=20_000, on_progress=seen.append
    )
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert seen[-1] == report.bytes_read

    def stop(bytes_read):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_into(ranks[0], hf, topology=TP2, rank=0, staging_bytes=20_000, on_progress=stop)


def test_tensors_that_are_not_the_ranks_are_named(tmp_path) -> None:
    hf = save(tmp_path, "llama")
    _, ranks = converted(hf, tmp_path, TP2_PP2)
    norm = "model.decoder.0.pp_block.input_layernorm.weight"

    def refuse(error, message, topology=TP2_PP2, rank=0, **options):
        found = poisoned(ranks[0]) | changes
        kept = {name: tensor for name, tensor in found.items() if tensor is not None}
        with pytest.raises(error, match=message):
            load_into(kept, hf, topology=topology, rank=rank, **options)
        for name, tensor in kept.items():
            assert name in changes or tensor.isnan().all(), name

    changes = {norm: None, QKV: None, "model.nonsense": torch.zeros(1), HEAD: torch.zeros(80, 64)}
    refuse(
        TopologyError,
        rf"rank 0 of TP=2 PP=2: 2 of its tensors are missing: {QKV}, {norm}; "
        rf"2 are not its own: {HEAD}, model.nonsense",
    )
    changes = {QKV: torch.zeros(64, 63), norm: torch.zeros(32)}
    refuse(
        TopologyError,
        rf"2 have another shape: {QKV} is \[64, 63\] and should be \[64, 64\], "
        rf"{norm} is \[32\] and should be \[64\]",
    )
    changes = {}
    refuse(TopologyError, "of its tensors are missing", rank=3)
    refuse(TopologyError, "rank 4: TP=2 PP=2 has ranks 0 to 3", rank=4)
    refuse(TopologyError, "have another shape", topology=Topology(tp=4, pp=2))
    refuse(TopologyError, "kv heads do not split over tp=8", topology=Topology(tp=8))
    refuse(ConfigError, "workers 0: it should be at least 1", workers=0)
    refuse(ConfigError, "staging_bytes 10: it should be at least 4096", staging_bytes=10)
    refuse(ConfigError, "--pad-vocab-to-multiple-of 0", pad_vocab_to_multiple_of=0)
    refuse(ValueError, "weight: it is on cpu, not on cuda", device="cuda")
    changes = {QKV: torch.zeros(64, 64, dtype=torch.int8)}
    refuse(ValueError, f"{QKV}: torch.int8 is not one of torch.bfloat16, ")
    changes = {QKV: torch.zeros(64, 64).t()[:, ::2]}
    refuse(ValueError, f"{QKV}: it is not contiguous: its strides are ")
    changes = {QKV: torch.zeros(64, 64, device="meta")}
    refuse(ValueError, f"{QKV}: it is on meta, not on cpu")
    changes = {norm: torch.zeros(64)}
    changes[norm.replace("input", "post_attention")] = changes[norm]
    refuse(TopologyError, "share memory, and are two in the model")
    changes = {QKV: torch.zeros(64, 64).double()}
    refuse(UnsupportedModelError, f"{QKV}: BF16 in the checkpoint, F64 in memory; F64 is not cast")


def test_checkpoints_that_do_not_fit_are_refused(tmp_path) -> None:
    model = make("llama")
    hf = model.save(tmp_path / "hf")
    _, ranks = converted(hf, tmp_path, TP2_PP2)

    def refuse(root, error, message, **options):
        found = poisoned(ranks[0])
        with pytest.raises(error, match=message):
            load_into(found, root, topology=TP2_PP2, rank=0, **options)
        assert all(tensor.isnan().all() for tensor in found.values())

    # Of the last layer, which another rank owns.
    last = "model.layers.5.mlp.up_proj.weight"
    short = {**model.tensors, last: Tensor("BF16", (95, 64), bytes(95 * 128))}
    save_as = functools.partial(make, "llama")
    for name, tensors, message in (
        ("missing", _without(model.tensors, last), f"{last} is missing"),
        ("short", short, rf"{last} has shape \[95, 64\], config.json calls for \[96, 64\]"),
        (
            "more",
            {**model.tensors, "model.layers.5.extra": Tensor("BF16", (1,), b"12")},
            "1 tensors have no place in Nanotron's llama: model.layers.5.extra",
        ),
    ):
        other = save_as()
        other.tensors = tensors
        refuse(other.save(tmp_path / name), CheckpointError, message)
    scaled = make("llama", rope_scaling={"rope_type": "linear", "factor": 2.0})
    refuse(scaled.save(tmp_path / "scaled"), UnsupportedModelError, "rope_scaling 'linear'")
    load_into(ranks[0], tmp_path / "scaled", topology=TP2_PP2, rank=0, target="nanotron-fast")
    refuse(tmp_path / "nowhere", CheckpointError, "no such directory")
    tied = make("llama", tie_word_embeddings=True)
    copy = Tensor("BF16", (159, 64), bytes(159 * 128))
    root = tied.save(tmp_path / "tied", extra={"lm_head.weight": copy})
    refuse(root, CheckpointError, "tie_word_embeddings is true, but lm_head.weight is BF16")


@settings(deadline=None, max_examples=60)
@given(build=builders(max_size=20), capacity=st.integers(256, 3000), direct=st.booleans())
def test_batches_do_what_the_plan_does(build, capacity, direct) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan = write_sources(build, Path(folder))
        paths = [str(path) for path in plan.sources]
        outputs = [np.zeros(output.size_bytes, np.uint8) for output in plan.outputs]
        for data, output in zip(outputs, plan.outputs, strict=True):
            data[: len(output.header)] = np.frombuffer(output.header, np.uint8)
        number = len(outputs)
        batches = list(batches_of(plan.moves, capacity, staging=number, reads_direct=direct))
        for batch in batches:
            assert batch.staged_bytes <= capacity
            staging = np.full(batch.staged_bytes, 0x55, np.uint8)
            memories = [(data.ctypes.data, data.size) for data in (*outputs, staging)]
            _C.read_ranges(paths, table_of(batch.reads), memories, workers=2)
            for move in batch.packs:
                source = None if move.source == FILL else staging
                reference.apply_move(move, source, outputs[move.destination])
            assert direct or all(move.destination == number for move in batch.reads)
        expected = reference.execute_in_memory(plan)
        for data, output in zip(outputs, plan.outputs, strict=True):
            assert np.array_equal(data, expected[output.path])


def test_large_moves_are_cut_for_the_buffer(tmp_path) -> None:
    hf = save(tmp_path, "qwen2_moe", vocab_size=4000, moe_intermediate_size=200)
    _, ranks = converted(hf, tmp_path, TP2, dtype="fp32")
    check_ranks(ranks, hf, TP2, staging_bytes=4096, workers=3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("staging_bytes", [None, 5000])
@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_loads_onto_a_gpu(tmp_path, family, staging_bytes) -> None:
    hf = save(tmp_path, family)
    root, ranks = converted(hf, tmp_path, TP2)
    for source in (hf, root):
        check_ranks(ranks, source, TP2, device="cuda", staging_bytes=staging_bytes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"topology": (2, 1)}, TypeError, r"is \(2, 1\), a tuple: give .*Topology\(tp=2, pp=1\)"),
        ({"topology": 4}, TypeError, r"a int: give nanotron_fast\.Topology\(tp=\.\.\., pp="),
        ({"rank": "0"}, TypeError, "rank is '0': give a whole number"),
        ({"tensors": [torch.zeros(1)]}, TypeError, "tensors is a list: give a module with"),
        ({"tensors": {"x": [1.0]}}, TypeError, "x: a list, not a tensor"),
    ],
)
def test_arguments_of_another_kind(
    changes: dict, error: type[Exception], message: str, golden_hf: Path
) -> None:
    arguments = {"tensors": {}, "topology": Topology(), "rank": 0, **changes}
    with pytest.raises(error, match=message):
        load_into(arguments.pop("tensors"), golden_hf, **arguments)


def test_a_transformers_model_is_sent_to_its_own_loader(golden_hf: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ConfigError, match="a transformers LlamaForCausalLM has Hugging Face's"):
        load_into(model, golden_hf, topology=Topology(), rank=0)
