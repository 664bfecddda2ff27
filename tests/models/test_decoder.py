"""Stages, documents, recomputation and what is refused, in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import nanotron_fast as nf
from nanotron_fast.errors import ConfigError, TopologyError, UnsupportedModelError
from nanotron_fast.families import family_named
from nanotron_fast.families.decoder import BLOCK, LAYER
from nanotron_fast.families.rules import Copy, Rule
from nanotron_fast.model.topology import Topology
from nanotron_fast.models import Architecture, Decoder, build, facts_of
from nanotron_fast.models.names import embedding_of
from tests.models.tiny import VOCAB, assert_near, save, tokens

FAMILIES = ("llama", "mistral", "qwen2_moe", "starcoder2")
EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
HEAD = "model.lm_head.pp_block.weight"


def saved(tmp_path: Path, family: str, **changes: object) -> Path:
    window = {"sliding_window": 5} if family == "mistral" else {}
    return save(tmp_path / "hf", family, **window, **changes)


def grads(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in decoder.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_two_stages_are_one_model(family: str, is_tied: bool, tmp_path: Path) -> None:
    root = saved(tmp_path, family, tie_word_embeddings=is_tied)
    ids, labels = tokens(2, 12)
    whole = build(root)
    expected = whole(ids, labels=labels)
    expected.backward()
    topology = Topology(pp=2)
    first, second = (build(root, topology=topology, rank=rank) for rank in range(2))
    stream = first(ids)
    assert stream.shape == (24, 48)
    handed = stream.detach().requires_grad_()
    loss = second(handed, labels=labels)
    assert torch.equal(loss, expected)
    loss.backward()
    stream.backward(handed.grad)
    found = {**grads(first), **grads(second)}
    if is_tied:
        embedding = embedding_of(whole.architecture.family)
        assert facts_of(first)[embedding].tied_with == HEAD
        assert facts_of(second)[HEAD].tied_with == embedding
        assert facts_of(second)[HEAD].stored_name == embedding
        assert torch.equal(first.get_parameter(embedding), second.get_parameter(HEAD))
        found[embedding] += found.pop(HEAD)
    for name, grad in grads(whole).items():
        assert_near(found.pop(name), grad, name, 1e-6)
    assert not found


def test_chunks_of_a_rank_are_loaded_by_their_blocks(tmp_path: Path) -> None:
    """As an interleaved schedule has them, whose stages are not Nanotron's."""
    root = saved(tmp_path, "llama", num_hidden_layers=4, tie_word_embeddings=True)
    ids, labels = tokens(2, 8)
    chunks = [["embedding", 0], [1], [2], [3, "norm", "head"]]
    x = ids
    for blocks in chunks:
        part = build(root, blocks=blocks, topology=Topology(pp=2))
        x = part(x, shape=(2, 8), labels=labels if "head" in blocks else None)
    assert torch.equal(x, build(root)(ids, labels=labels))
    for wrong in ([0, 2], []):
        with pytest.raises(ConfigError, match="follow each other"):
            build(root, blocks=wrong)


def test_norm_and_head_on_stages_of_their_own(tmp_path: Path) -> None:
    root = saved(tmp_path, "llama")
    ids, labels = tokens(2, 8)
    layers = range(Architecture.of_checkpoint(root).spec.num_layers)
    x = ids
    for blocks in (["embedding", *layers], ["norm"], ["head"]):
        part = build(root, blocks=blocks, topology=Topology(pp=3))
        x = part(x, shape=(2, 8), labels=labels if "head" in blocks else None)
    assert torch.equal(x, build(root)(ids, labels=labels))


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_packed_are_documents_apart(family: str, tmp_path: Path) -> None:
    decoder = build(saved(tmp_path, family))
    ids, labels = tokens(2, 20)
    edges = ([0, 3, 4, 20], [0, 11, 20])
    position_ids = torch.stack(
        [torch.cat([torch.arange(b - a) for a, b in pairwise(row)]) for row in edges]
    )
    packed = decoder(ids, position_ids=position_ids)
    for row, places in enumerate(edges):
        for a, b in pairwise(places):
            alone = decoder(ids[row : row + 1, a:b])
            assert_near(packed[row, a:b], alone[0], f"document {a} to {b} of row {row}")
    assert float((packed - decoder(ids)).detach().abs().max()) > 1e-2
    loss = decoder(ids, labels=labels, position_ids=position_ids)
    expected = torch.nn.functional.cross_entropy(packed.flatten(0, 1), labels.flatten())
    assert_near(loss, expected, "loss", 1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "starcoder2"])
def test_recomputing_changes_nothing(family: str, tmp_path: Path) -> None:
    root = saved(tmp_path, family)
    ids, labels = tokens(2, 12)
    found = {}
    for recompute in ("none", "products", "layer"):
        decoder = build(root, recompute=recompute, auxiliary_loss=0.5)
        decoder(ids, labels=labels).backward()
        found[recompute] = grads(decoder)
    for name, grad in found["none"].items():
        assert torch.equal(found["products"][name], grad), name
        assert torch.equal(found["layer"][name], grad), name
    with pytest.raises(ConfigError, match="recompute 'some': choose none, products, layer"):
        build(root, recompute="some")


def test_the_auxiliary_loss_balances_the_experts(tmp_path: Path) -> None:
    """Its gradient is that of the formula, of each layer by itself."""
    root = saved(tmp_path, "qwen2_moe", num_hidden_layers=1)
    ids, labels = tokens(2, 12)
    without, with_loss = build(root), build(root, auxiliary_loss=0.25)
    without(ids, labels=labels).backward()
    with_loss(ids, labels=labels).backward()
    layer = without.layers[0]
    inputs: list[torch.Tensor] = []
    layer.mlp.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    without(ids)
    probabilities = (inputs[0].detach() @ layer.mlp.router.weight.T).softmax(-1)
    chosen = probabilities.topk(2).indices
    f = torch.nn.functional.one_hot(chosen, 4).sum((0, 1)) / len(probabilities)
    loss = 0.25 * 4 * (f * probabilities.mean(0)).sum()
    (expected,) = torch.autograd.grad(loss, layer.mlp.router.weight)
    name = "model.decoder.0.pp_block.mlp.router.weight"
    assert_near(grads(with_loss)[name] - grads(without)[name], expected, name, 1e-4)


def test_neighbours_may_be_rotated_and_any_topology_be_read(tmp_path: Path) -> None:
    root = saved(tmp_path, "llama")
    ids, _ = tokens(1, 12)
    expected = build(root)(ids)
    turned = build(root, rope_interleaved=True)
    assert turned.setting.interleaved
    assert_near(turned(ids), expected, "interleaved")
    stored = tmp_path / "nanotron"
    nf.convert(root, stored, topology=nf.Topology(tp=2, pp=3), rope_interleaved=True)
    again = build(stored)
    assert again.setting.interleaved
    assert torch.equal(again(ids), turned(ids))


def test_what_no_family_has_a_parameter_for_is_refused(tmp_path: Path) -> None:
    architecture = build(saved(tmp_path, "llama")).architecture
    spec = architecture.spec.with_attention(qk_norm="head")
    with pytest.raises(UnsupportedModelError, match=r"attn\.q_norm\.weight"):
        build(Architecture.of_spec(spec, family="llama"))
    odd = architecture.spec.with_attention(qk_norm="head", softcap=3.0, window=5)
    with pytest.raises(UnsupportedModelError, match=r"no family.s config\.json can say all"):
        build(odd)


def test_what_no_module_computes_with_is_refused(tmp_path: Path) -> None:
    rule = Copy(f"{LAYER}input_layernorm.bias", f"{BLOCK}input_layernorm.bias", rows="hidden")
    llama = family_named("llama")
    family = replace(llama, rules=(*llama.rules, rule))
    root = saved(tmp_path, "llama")
    architecture = replace(Architecture.of_checkpoint(root), family=family)
    with pytest.raises(UnsupportedModelError, match=r"0.pp_block.input_layernorm.bias: it is a "):
        Decoder(architecture)
    elsewhere = replace(llama, rules=tuple(map(_renamed, llama.rules)))
    with pytest.raises(UnsupportedModelError, match=r"embedding is model\.words\.weight, a name"):
        Decoder(replace(architecture, family=elsewhere))


def _renamed(rule: Rule) -> Rule:
    is_embedding = rule.block == "embedding"
    return replace(rule, param="model.words.weight") if is_embedding else rule


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}])
def test_a_scaling_is_honoured_where_it_was_trained_with(scaling, tmp_path: Path) -> None:
    root = saved(tmp_path, "llama", rope_scaling=scaling)
    stored = tmp_path / "nanotron"
    nf.convert(root, stored, target="nanotron-fast")
    assert Architecture.of_checkpoint(stored).spec.rope_scaling == scaling
    (stored / "nanotron_fast.json").unlink()
    # Without a word of us, stock Nanotron has trained it, and ignored the scaling.
    assert Architecture.of_checkpoint(stored).spec.rope_scaling is None
    trained_by_us = Architecture.of_checkpoint(stored, target="nanotron-fast")
    assert trained_by_us.spec.rope_scaling == scaling


def test_nanotron_gives_layers_without_rotary_embedding_no_window(tmp_path: Path) -> None:
    nf.convert(saved(tmp_path, "smollm3"), tmp_path / "nanotron")
    path = tmp_path / "nanotron" / "model_config.json"
    config = {**json.loads(path.read_text()), "sliding_window_size": 5}
    path.write_text(json.dumps(config))
    expected = (5, 5, None)
    assert Architecture.of_model_config(config).spec.windows == expected
    assert Architecture.of_checkpoint(tmp_path / "nanotron").spec.windows == expected


def test_a_z_loss_and_labels_that_do_not_count(tmp_path: Path) -> None:
    root = saved(tmp_path, "llama")
    ids, labels = tokens(2, 12)
    logits = build(root)(ids).flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, labels.flatten())
    z = logits.logsumexp(-1).square()[labels.flatten() != -100].mean()
    loss = build(root, z_loss=0.01, z_loss_mode="correct")(ids, labels=labels)
    assert_near(loss, plain + 0.01 * z, "loss", 1e-6)
    assert build(root)(ids, labels=torch.full_like(labels, -100)) == 0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    root = saved(tmp_path, "llama")
    ids, labels = tokens(2, 12)
    topology = Topology(pp=2)
    first, second = (build(root, topology=topology, rank=rank) for rank in range(2))
    with pytest.raises(ValueError, match="labels are for the last stage"):
        first(ids, labels=labels)
    with pytest.raises(ValueError, match="a later stage takes"):
        second(ids)
    with pytest.raises(ValueError, match="23 tokens for 2 rows of 12"):
        second(torch.zeros(23, 48), labels=labels)
    with pytest.raises(TopologyError, match="a group of 1 ranks for TP=2"):
        build(root, topology=Topology(tp=2), rank=0)(ids)
    with pytest.raises(TopologyError, match="8 heads do not split over tp=3"):
        build(root, topology=Topology(tp=3), rank=0)


def test_facts_say_how_each_parameter_is_kept(tmp_path: Path) -> None:
    root = saved(tmp_path, "qwen2_moe")
    architecture = Architecture.of_checkpoint(root)
    facts = facts_of(Decoder(architecture))
    block = "model.decoder.0.pp_block."
    roles = {
        EMBEDDING: "embedding",
        HEAD: "head",
        f"{block}attn.qkv_proj.weight": "column",
        f"{block}attn.qkv_proj.bias": "bias",
        f"{block}attn.o_proj.weight": "row",
        f"{block}mlp.router.weight": "router",
        f"{block}mlp.experts.merged_gate_up_proj": "column",
        f"{block}mlp.experts.merged_down_proj": "row",
        f"{block}mlp.shared_expert_gate.weight": "column",
        f"{block}input_layernorm.weight": "norm",
        "model.final_layer_norm.pp_block.weight": "norm",
    }
    assert {name: facts[name].role for name in roles} == roles
    assert facts[f"{block}attn.o_proj.weight"].is_hidden_matrix
    assert not facts[f"{block}mlp.shared_expert_gate.weight"].is_hidden_matrix
    assert not facts[HEAD].is_hidden_matrix
    norm = facts[f"{block}input_layernorm.weight"]
    assert not norm.is_decayed([".*norm"])
    assert norm.is_decayed(["norm"])
    assert norm.is_counted(0)
    assert not norm.is_counted(1)
    assert facts[HEAD].is_counted(1)
    assert not any(each.sums_over_tp for each in facts.values())
    scattered = facts_of(Decoder(architecture, mode="reduce_scatter"))
    assert scattered[f"{block}mlp.router.weight"].sums_over_tp
    assert not scattered[f"{block}attn.qkv_proj.bias"].sums_over_tp


def test_a_model_config_of_a_yaml(tmp_path: Path) -> None:
    root = saved(tmp_path, "qwen2_moe")
    nf.convert(root, tmp_path / "nanotron")
    config = json.loads((tmp_path / "nanotron" / "model_config.json").read_text())
    architecture = Architecture.of_model_config(config)
    expected = Architecture.of_checkpoint(root)
    assert architecture.family is expected.family
    assert architecture.params() == expected.params()
    assert architecture.spec.layers == expected.spec.layers
    assert architecture.vocab_size == VOCAB


QWEN2_LAYER = """
input_layernorm.weight post_attention_layernorm.weight
attn.qkv_proj.weight attn.qkv_proj.bias attn.o_proj.weight
"""
DENSE = "mlp.gate_up_proj.weight mlp.down_proj.weight"
# As named_parameters() of Nanotron's models gives them, at 2411b022.
ORDERS = {
    "llama": f"""
        input_layernorm.weight attn.qkv_proj.weight attn.o_proj.weight
        post_attention_layernorm.weight {DENSE}
    """,
    "qwen2": f"{QWEN2_LAYER} {DENSE}",
    "qwen2_moe": f"""
        {QWEN2_LAYER} mlp.router.weight
        mlp.shared_expert.gate_up_proj.weight mlp.shared_expert.down_proj.weight
        mlp.shared_expert_gate.weight
        mlp.experts.merged_gate_up_proj mlp.experts.merged_down_proj
    """,
}


@pytest.mark.parametrize("family", ORDERS)
def test_parameters_come_in_the_order_of_nanotrons(family: str, tmp_path: Path) -> None:
    """The states in an optimizer's file are numbered in it, and Nanotron takes them by number."""
    decoder = Decoder(Architecture.of_checkpoint(saved(tmp_path, family)))
    names = [name for name, _ in decoder.named_parameters()]
    prefix = "model.decoder.0.pp_block."
    found = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    assert found == ORDERS[family].split()
    ends = [name for name in names if ".decoder." not in name]
    assert ends == [EMBEDDING, "model.final_layer_norm.pp_block.weight", HEAD]
    assert names[0] == EMBEDDING
    assert names[-2:] == ends[1:]
