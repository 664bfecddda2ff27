"""What a run will take is right where it can be counted by hand, or by what torch keeps."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nanotron_fast
from nanotron_fast.cli.dry_run import dry_run, overrides_of
from nanotron_fast.cli.reporting import stage_lines
from nanotron_fast.errors import CheckpointError, ConfigError, TopologyError
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG
from nanotron_fast.kernels.rope.tables import rope_tables
from nanotron_fast.model.spec import Attention, Dense, Layer
from nanotron_fast.models import build
from nanotron_fast.models.batch import Batch
from nanotron_fast.models.norm import Norm
from nanotron_fast.parallel.attention import tensor_parallel_attention
from nanotron_fast.parallel.mlp import tensor_parallel_mlp
from nanotron_fast.train import TrainingConfig
from nanotron_fast.train.activations import MicroBatch, in_flight
from nanotron_fast.train.advice import advice
from nanotron_fast.train.architecture import architecture
from nanotron_fast.train.devices import peak_flops
from nanotron_fast.train.estimate import Estimate, estimate
from tests.families import zoo
from tests.modelzoo import make
from tests.train.configs import MODEL_CONFIG, document, save

# Of the small Llama: products of a layer, everything of it, embedding and head.
LAYER_PRODUCTS = (64 + 2 * 32) * 64 + 64 * 64 + 3 * 160 * 64
LAYER = LAYER_PRODUCTS + 2 * 64
ROWS = 512 * 64
LLAMA = 4 * LAYER + 64 + 2 * ROWS


def of(**changes: Any) -> Estimate:
    config = TrainingConfig.from_dict(document(**changes))
    return estimate(config, architecture(config))


def capped() -> dict[str, Any]:
    """The small Llama in this package's class, its logits capped."""
    plain = architecture(TrainingConfig.from_dict(document())).architecture.spec
    return NANOTRON_FAST_CONFIG.write(
        replace(plain, logit_softcap=30.0), family="llama", version="1.5", rope_interleaved=False
    )


def layout(**changes: Any) -> dict[str, Any]:
    return {"parallelism": {"dp": 1, "pp": 1, "tp": 1, **changes}}


def test_parameters_tokens_and_flops() -> None:
    found = of(data_stages__0__sequence_length=16)
    assert found.parameters == LLAMA
    assert found.layer_stages == (0, 0, 0, 0)
    assert found.tokens_per_step == 8 * 16
    pairs = 16 * 17 // 2
    products = 4 * LAYER_PRODUCTS + ROWS
    assert found.flops_per_step == 8 * (6 * products * 16 + 4 * 12 * 64 * pairs)
    tied = of(model__model_config={**MODEL_CONFIG, "tie_word_embeddings": True})
    assert tied.parameters == LLAMA - ROWS


def test_layers_of_a_stage_with_several_parts_are_shown_part_by_part() -> None:
    others = {"embedding": 0, "norm": 1, "head": 1, "loss": 2}
    assert list(stage_lines((0, 0, 1, 0), others, 2)) == [
        "stage 0: layers 0-1, 3",
        "stage 1: layers 2",
    ]
    assert list(stage_lines((0, 0, 0, 0), others, 3)) == [
        "stage 0: layers 0-3",
        "stage 1: final norm, head",
        "stage 2: loss",
    ]
    assert list(stage_lines((0,), {}, 2)) == ["stage 0: layers 0", "stage 1: nothing"]
    assert list(stage_lines((), {}, 2)) == []


def test_what_stages_without_layers_own_is_shown(tmp_path: Path) -> None:
    path = save(tmp_path / "c.yaml")
    loss = "head, cast to fp32, loss"
    ends = {
        6: ["stage 4: final norm", f"stage 5: {loss}"],
        5: [f"stage 4: final norm, {loss}"],
    }
    for pp, last in ends.items():
        told = [line.strip() for line in dry_run(path, [f"--parallelism.pp={pp}"]).lines()]
        stages = [line for line in told if line.startswith("stage ")]
        expected = [f"stage {stage}: layers {stage}" for stage in range(4)]
        assert stages == expected + last


def test_a_window_and_experts_count_what_a_token_goes_through() -> None:
    sizes = {key: value for key, value in MODEL_CONFIG.items() if key != "is_llama_config"}
    plain = of(model__model_config={**sizes, "is_qwen2_config": True})
    windowed = of(model__model_config={**sizes, "is_qwen2_config": True, "sliding_window_size": 10})
    # The first ten queries of a sequence of 32 see 1 to 10 keys, the other 22 see 10.
    fewer = 32 * 33 // 2 - (55 + 220)
    assert plain.flops_per_step - windowed.flops_per_step == 8 * 4 * 12 * 64 * fewer
    experts = {
        "num_experts": 8, "top_k": 2, "moe_intermediate_size": 16, "layers": [1],
        "enable_shared_expert": True, "shared_expert_intermediate_size": 24,
    }  # fmt: skip
    moe = of(model__model_config={**sizes, "is_qwen2_config": True, "moe_config": experts})
    dense, expert, shared = 3 * 160 * 64, 3 * 16 * 64, 3 * 24 * 64 + 64
    router = 8 * 64
    assert moe.parameters - plain.parameters == 8 * expert + shared + router - dense
    per_token = 2 * expert + shared + router - dense
    assert moe.flops_per_step - plain.flops_per_step == 8 * 32 * 6 * per_token


def test_states_of_every_kind() -> None:
    memory = of().memory
    assert memory.weights == 2 * LLAMA
    assert memory.gradients == memory.masters == 4 * LLAMA
    assert memory.moments == 8 * LLAMA
    assert memory.total == sum(asdict(memory).values())
    # A micro batch of two samples.
    assert memory.logits == 2 * 32 * 512 * 2
    # Capped ones, with what the cap keeps of them, and their gradient.
    assert of(model__model_config=capped()).memory.logits == 3 * memory.logits
    # Sums and masters are in fp32 whatever it says.
    assert of(optimizer__accumulate_grad_in_fp32=False).memory == memory
    fp32 = of(model__dtype="float32").memory
    assert (fp32.weights, fp32.gradients, fp32.masters) == (4 * LLAMA, 4 * LLAMA, 0)
    # Muon keeps one number for each element of a layer's matrices, AdamW two for the rest.
    muon = of(optimizer__optimizer_factory={"name": "muon"}).memory
    assert muon.moments == 4 * (2 * LLAMA - 4 * LAYER_PRODUCTS)
    # Experts are matrices of the layer, a router and a gate of one row are not.
    experts = {
        "num_experts": 8, "top_k": 2, "moe_intermediate_size": 16, "layers": [1],
        "enable_shared_expert": True, "shared_expert_intermediate_size": 24,
    }  # fmt: skip
    sizes = {key: value for key, value in MODEL_CONFIG.items() if key != "is_llama_config"}
    moe = {**sizes, "is_qwen2_config": True, "moe_config": experts}
    adamw, muon = (
        of(model__model_config=moe, **changes).memory.moments
        for changes in ({}, {"optimizer__optimizer_factory": {"name": "muon"}})
    )
    matrices = 4 * LAYER_PRODUCTS - 3 * 160 * 64 + 8 * 3 * 16 * 64 + 3 * 24 * 64
    assert adamw - muon == 4 * matrices


def test_shards_and_slices() -> None:
    # 512 rows are 171 for each of three ranks, once the vocabulary is padded.
    sharded = of(**layout(tp=2), model__make_vocab_size_divisible_by=3)
    assert sharded.parameters == LLAMA
    padded = 516 * 64
    norms = 4 * 2 * 64 + 64
    assert sharded.memory.weights == 2 * ((4 * LAYER_PRODUCTS + 2 * padded) // 2 + norms)
    assert sharded.memory.logits == 64 * (516 // 2) * 2
    shared = of(**layout(dp=3), optimizer__zero_stage=1)
    assert shared.tokens_per_step == 3 * 8 * 32
    assert shared.memory.weights == 2 * LLAMA
    # Each parameter's slice is rounded up: of 64 elements 22.
    matrices = (8192, 4096, 20480, 10240)
    slices = 4 * (sum(-(-each // 3) for each in matrices) + 2 * 22) + 22 + 2 * -(-ROWS // 3)
    assert shared.memory.masters == 4 * slices
    assert shared.memory.moments == 8 * slices


def test_rows_and_what_is_gathered_of_them() -> None:
    # Of 64, 128, 320 and 512 rows each of three ranks has 22, 43, 107 and 171 at the most.
    layer = (43 + 22 + 107) * 64 + 22 * 160 + 2 * 22
    rows = 4 * layer + 22 + 2 * 171 * 64
    beside = 64 + 2 * ROWS
    memory = of(**layout(dp=3), optimizer__zero_stage=3).memory
    assert memory.masters == 4 * rows
    assert memory.moments == 8 * rows
    assert memory.weights == 2 * (beside + 2 * LAYER)
    assert memory.gradients == 4 * rows + 2 * (beside + LAYER) + 4 * max(beside, LAYER)
    fp32 = of(**layout(dp=3), optimizer__zero_stage=3, model__dtype="float32").memory
    assert (fp32.masters, fp32.moments) == (0, 8 * rows)
    assert fp32.weights == 4 * rows + 4 * (beside + 2 * LAYER)
    muon = of(
        **layout(dp=3), optimizer__zero_stage=3, optimizer__optimizer_factory={"name": "muon"}
    )
    assert muon.memory.moments == 8 * rows - 4 * 4 * (layer - 2 * 22)
    # A single data-parallel rank has nobody to share with.
    assert of(optimizer__zero_stage=3).memory == of().memory


def test_zero_3_is_proposed_where_nothing_but_more_ranks_would_help() -> None:
    document_ = document(**layout(dp=8), optimizer__zero_stage=1)
    document_["parallelism"]["recompute_layer"] = True
    document_["tokens"]["micro_batch_size"] = 1
    document_["model"]["model_config"]["num_hidden_layers"] = 32
    config = TrainingConfig.from_dict(document_)
    model = architecture(config)
    needed = estimate(config, model).memory.total
    first, *_ = advice(config, model, needed * 2 // 3)[1:]
    assert first.startswith("--optimizer.zero_stage=3 (8 ranks):")


def test_stages_own_their_layers_and_a_tied_embedding_twice() -> None:
    tied = {**MODEL_CONFIG, "tie_word_embeddings": True}
    found = of(**layout(pp=2), model__model_config=tied)
    # As Nanotron assigns them: the head counts as a layer's cost.
    assert found.layer_stages == (0, 0, 0, 1)
    first, last = found.memory_by_stage
    assert first.weights == 2 * (3 * LAYER + ROWS)
    assert last.weights == 2 * (LAYER + 64 + ROWS)
    # All forward passes come first, and each keeps its logits.
    assert (first.logits, last.logits) == (0, 4 * 64 * 512 * 2)
    of_1f1b = of(**layout(pp=2, pp_engine="1f1b")).memory_by_stage
    assert [stage.logits for stage in of_1f1b] == [0, 64 * 512 * 2]
    assert found.fullest_stage == 0
    assert found.memory == first
    chunked = of(**layout(pp=2, pp_engine="interleaved"))
    assert chunked.layer_stages == (0, 0, 1, 0)
    with pytest.raises(TopologyError, match=r"pp is 16, .*its 4 layers"):
        of(**layout(pp=16))
    with pytest.raises(TopologyError, match=r"4 kv heads do not split over tp=8"):
        of(**layout(tp=8))


def test_micro_batches_under_way() -> None:
    def count(engine: str, rank: int, micro_batches: int, chunks: int = 1) -> float:
        return in_flight(engine, rank=rank, pp=4, chunks=chunks, num_micro_batches=micro_batches)

    assert [count("afab", rank, 8) for rank in (0, 3)] == [8, 8]
    assert [count("1f1b", rank, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert count("1f1b", 3, 2) == 2
    # (chunks - 1) * 4 + 2 * (3 - rank) + 1 parts of half the layers.
    assert [count("interleaved", rank, 8, 2) for rank in (0, 3)] == [11 / 2, 5 / 2]
    assert in_flight("afab", rank=0, pp=1, chunks=1, num_micro_batches=8) == 1


def test_activations_follow_what_the_operations_save() -> None:
    """Torch is asked what attention and MLP keep; the norms' part is by their formula."""
    tokens, hidden, heads, kv_heads, head_dim, inner = 24, 32, 4, 2, 8, 48
    weights = {
        name: torch.randn(*shape, requires_grad=True)
        for name, shape in {
            "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
            "o": (hidden, heads * head_dim),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }.items()
    }
    cos, sin = rope_tables(head_dim, tokens, 10000.0)
    left_out = {each.data_ptr() for each in (*weights.values(), cos, sin)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in left_out:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    x, y = torch.randn(2, tokens, hidden).unbind()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = (
            tensor_parallel_attention(
                x.clone().requires_grad_(), weights["qkv"], weights["o"], cos, sin,
                num_q_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, recompute=False,
            ),
            tensor_parallel_mlp(
                y.clone().requires_grad_(), weights["gate_up"], weights["down"], recompute=False
            ),
        )  # fmt: skip
    layer = Layer(Attention(heads, kv_heads, head_dim, (0, head_dim)), Dense(inner))
    batch = MicroBatch(
        tokens=tokens, hidden_size=hidden, value_bytes=4, tp=1, is_scattered=False,
        recomputes_layers=False,
    )  # fmt: skip
    norms = 2 * tokens * (hidden * 4 + 4)
    assert sum(saved.values()) == batch.kept(layer) - norms
    assert len(results) == 2


@pytest.mark.parametrize("family", ["starcoder2", "llama", "gemma2", "gemma3_text", "cohere2"])
def test_activations_of_what_is_computed_in_steps(family: str, tmp_path: Path) -> None:
    """Whole layers of several kinds; of a Llama with biases its MLP."""
    if family in zoo.ZOO:
        root = zoo.save(family, tmp_path / "hf")
    else:
        changes = {"mlp_bias": True} if family == "llama" else {}
        root = make(family, dtype="F32", **changes).save(tmp_path / "hf")
    decoder = build(root)
    layer, spec = decoder.layers[0], decoder.architecture.spec
    micro = Batch(2, 12, torch.device("cpu"), max_positions=12)
    tables = decoder.setting.rotary.tables(spec.layers[0].attention, 12, micro.device)
    given = (*decoder.parameters(), *tables)
    left_out = {each.data_ptr() for each in given}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Positions are integers.
        if tensor.data_ptr() not in left_out and tensor.is_floating_point():
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    batch = MicroBatch(
        tokens=24, hidden_size=spec.hidden_size, value_bytes=4, tp=1, is_scattered=False,
        recomputes_layers=False, packs_by_kv_head=family == "starcoder2",
    )  # fmt: skip
    x, residual = torch.randn(2, 24, spec.hidden_size, requires_grad=True).unbind()
    kept = batch.kept(spec.layers[0])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if family == "llama":
            results = layer.mlp(x)
            without = Layer(spec.layers[0].attention, Dense(spec.intermediate_size))
            # Beside what a fused one keeps: its input, gate and up. And plain torch keeps the
            # gate's activation.
            kept += batch.stream_bytes - batch.kept(without) + 3 * 24 * spec.intermediate_size * 4
        else:
            results = layer(x, residual, micro)
            if spec.norm != "rms_norm":
                # A LayerNorm keeps a mean besides.
                kept += len([each for each in layer.modules() if isinstance(each, Norm)]) * 4 * 24
            if family == "gemma3_text":
                # Plain torch has a mask for the window.
                kept += 4 * 12 * 12
    assert sum(saved.values()) == kept
    assert len(results) > 0


def test_what_recomputation_and_scattering_spare() -> None:
    plain = of().memory.activations
    stream = 64 * 64 * 2
    recomputed = of(**layout(recompute_layer=True)).memory.activations
    assert recomputed < plain
    deep = {**MODEL_CONFIG, "num_hidden_layers": 14}
    # Each layer more costs its input alone.
    more = of(**layout(recompute_layer=True), model__model_config=deep).memory.activations
    assert more - recomputed == 10 * stream
    whole = of(**layout(tp=2)).memory.activations
    scattered = of(**layout(tp=2, tp_mode="REDUCE_SCATTER")).memory.activations
    assert scattered < whole < plain


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_moe", "smollm3", "mistral"])
def test_the_architecture_of_a_folder(family: str, tmp_path: Path) -> None:
    hf = make(family).save(tmp_path / "hf")
    nanotron_fast.convert(hf, tmp_path / "nanotron")
    stored = nanotron_fast.inspect(hf)
    found = {}
    for kind in ("hf", "nanotron"):
        config = TrainingConfig.from_dict(
            document(
                model={"init_method": {"path": str(tmp_path / kind)}},
                tokens__sequence_length=16,
            )
        )
        model = architecture(config)
        assert stored.spec is not None
        assert model.architecture.spec.layers == stored.spec.layers
        found[kind] = (estimate(config, model), model.model_config)
        # What a checkpoint is written with is a configuration's architecture again.
        again = config.with_model_config(model.model_config)
        spec = architecture(again).architecture.spec
        assert spec.layers == model.architecture.spec.layers
        assert spec.vocab_size == model.architecture.spec.vocab_size
    assert found["hf"] == found["nanotron"]
    assert found["hf"][0].parameters == sum(stored.dtypes.values())


def test_an_architecture_that_is_not_there(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        config = document(model={"init_method": {"path": str(path)}})
        architecture(TrainingConfig.from_dict(config, name="x.yaml"))

    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"x.yaml: model.init_method.path is .*empty, which"):
        read(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"gone: no such directory"):
        read(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"tokens.sequence_length is 32, and the model has 16"):
        read(make("llama", max_position_embeddings=16).save(tmp_path / "short"))


def test_a_dry_run(tmp_path: Path) -> None:
    path = save(tmp_path / "c.yaml")
    found = dry_run(path, ["--parallelism.pp=2", "--tokens.train_steps=7"])
    result = json.loads(json.dumps(found.to_json()))
    assert [*result] == ["parameters", "stages", "tokens_per_step", "flops_per_step", "memory"]
    assert result["parameters"] == LLAMA
    assert result["stages"] == [0, 0, 0, 1]
    assert result["tokens_per_step"] == 256
    assert [*result["memory"]] == [
        "weights", "gradients", "masters", "moments", "activations", "logits", "total",
    ]  # fmt: skip
    text = "\n".join(found.lines())
    for words in (
        "parameters  238,144 in bfloat16",
        "ranks       2: dp=1 pp=2 tp=1, afab",
        "stage 0: layers 0-2",
        "256 tokens in 8 samples",
        "7 steps",
        "for a rank of stage 0, which needs most",
        "gradients ",
    ):
        assert words in text
    assert found.advice == ()


def test_what_to_change_where_it_does_not_fit(tmp_path: Path) -> None:
    path = save(
        tmp_path / "c.yaml", parallelism={"dp": 2, "pp": 2, "tp": 2}, tokens__micro_batch_size=4
    )
    needed = dry_run(path).estimate.memory.total
    roomy = dry_run(path, memory=str(needed))
    assert roomy.to_json()["fits"] is True
    assert [*roomy.lines()][-1].startswith("  it fits into ")
    tight = dry_run(path, memory=str(needed - 1))
    assert tight.to_json()["fits"] is False
    first, *ways = tight.advice
    assert "a rank needs" in first
    assert any(way.startswith("--optimizer.zero_stage=1 (8 ranks):") for way in ways)
    for way in ways:
        options = [word for word in way.partition(" (")[0].split() if word.startswith("--")]
        changed = dry_run(path, options)
        assert changed.estimate.memory.total < needed
        assert changed.config.global_batch_size == 32
    (_, both) = dry_run(path, memory=str(needed // 3)).advice
    assert both.startswith("together, --")
    options = [word for word in both.split() if word.startswith("--")]
    assert dry_run(path, options).estimate.memory.total <= needed // 3
    (_, hopeless) = dry_run(path, memory="1kB").advice
    assert hopeless.startswith("even --")
    with pytest.raises(ConfigError, match="--memory much: write it like 5GB"):
        dry_run(path, memory="much")


def test_other_words_of_the_command_line() -> None:
    assert overrides_of(["--tokens.train_steps=5"]) == ["--tokens.train_steps=5"]
    for word, message in {
        "--lr=1": "--lr: train has no such option; keys are set by --section.key=VALUE",
        "--tokens.train_steps": "write --tokens.train_steps=VALUE",
        "other.yaml": "other.yaml: one configuration is read",
    }.items():
        with pytest.raises(ConfigError, match=message):
            overrides_of([word])


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", None),
        ("cpu", None),
    ],
)
def test_what_a_device_can_do(name: str, teraflops: float | None) -> None:
    peak = peak_flops(name, "bfloat16")
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12))
    assert (peak_flops(name, "float32") is None) == (peak is None)
