"""A rank of test_ranks.py: tensor-parallel decoders beside the whole model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from typer.testing import CliRunner

from nanotron_fast.cli.commands import app
from nanotron_fast.model.topology import Topology
from nanotron_fast.models import build, facts_of
from nanotron_fast.models.generate import generate_ids
from tests.models.tiny import assert_near, shard_of, tokens
from tests.parallel.ranks import join, run_cases


def gathered(logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(parts, logits.detach().contiguous(), group=group)
    return torch.cat(parts, -1)


def agrees(root: Path, mode: str, recompute: str, auxiliary_loss: float, group) -> None:
    """Logits, loss, and every gradient, those that are to be summed over ranks after that sum."""
    options = {"recompute": recompute, "auxiliary_loss": auxiliary_loss}
    whole = build(root, auxiliary_loss=auxiliary_loss)
    ours = build(root, group=group, mode=mode, **options)
    ids, labels = tokens(2, 24)
    position_ids = torch.cat((torch.arange(10), torch.arange(14))).repeat(2, 1)
    expected = whole(ids, labels=labels, position_ids=position_ids)
    loss = ours(ids, labels=labels, position_ids=position_ids)
    assert_near(loss, expected, "loss", 1e-6)
    assert_near(gathered(ours(ids), group), whole(ids), "logits")
    expected.backward()
    loss.backward()
    grads = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, facts in facts_of(ours).items():
        if facts.param.is_frozen:
            continue
        grad = ours.get_parameter(name).grad
        if facts.sums_over_tp:
            dist.all_reduce(grad, group=group)
        if facts.copies > 1:
            sum_over_copies(grad.view(-1)[slice(*facts.copied)], facts.copies, group)
        wanted = shard_of(facts.param, grads[name], group.rank(), group.size())
        # That of a single number is a sum over the layer, in which much cancels.
        relative = 1e-4 if wanted.numel() == 1 else 2e-5
        assert_near(grad, wanted, f"gradient of {name}", relative)


def sends_tokens_to_experts(root: Path, recompute: str, group) -> None:
    """Two ranks with half of the experts each and tokens of their own, beside the whole model."""
    options = {"recompute": recompute, "auxiliary_loss": 0.1}
    ours = build(root, expert_group=group, **options)
    assert ours.topology == Topology(ep=2)
    grads: list[dict[str, torch.Tensor]] = []
    for rank in range(group.size()):
        whole = build(root, auxiliary_loss=0.1)
        ids, labels = tokens(2, 24 - 7 * rank, seed=rank)
        expected = whole(ids, labels=labels)
        expected.backward()
        grads.append({name: each.grad for name, each in whole.named_parameters()})
        if rank == group.rank():
            mine = ids, labels, whole(ids), expected
    ids, labels, logits, expected = mine
    assert_near(ours(ids), logits, "logits")
    loss = ours(ids, labels=labels)
    loss.backward()
    assert_near(loss, expected, "loss", 1e-6)
    for name, facts in facts_of(ours).items():
        grad = ours.get_parameter(name).grad
        if "ep" in facts.param.cuts:
            wanted = (grads[0][name] + grads[1][name]).chunk(2)[group.rank()]
            assert_near(grad, wanted, f"gradient of {name}")
        elif not facts.param.is_frozen:
            assert_near(grad, grads[group.rank()][name], f"gradient of {name}")


def one_rank_has_all_tokens(root: Path, group) -> None:
    """A router that sends every token to the first experts leaves the other rank without any."""
    whole, ours = build(root), build(root, expert_group=group)
    for model in (whole, ours):
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                parameter.data.fill_(-100.0)
                parameter.data[:2] = 100.0
    ids, labels = tokens(1, 8)
    expected, loss = whole(ids, labels=labels), ours(ids, labels=labels)
    assert_near(loss, expected, "loss", 1e-6)
    loss.backward()
    for name, parameter in ours.named_parameters():
        if ".experts.merged" in name:
            assert bool(parameter.grad.any()) is (group.rank() == 0), name


def sum_over_copies(grad: torch.Tensor, copies: int, group: dist.ProcessGroup) -> None:
    """Sums what neighbouring ranks have for one key-value head, by what all of them have."""
    parts = [torch.empty_like(grad) for _ in range(group.size())]
    dist.all_gather(parts, grad.contiguous(), group=group)
    first = group.rank() // copies * copies
    grad.copy_(sum(parts[first : first + copies]))


def loads_stage(root: Path, group) -> None:
    """A rank of TP=2 PP=2 has its own shards of its own layers."""
    whole = build(root)
    for stage in range(2):
        rank = stage * group.size() + group.rank()
        part = build(root, topology=Topology(tp=group.size(), pp=2), rank=rank, group=group)
        for name, facts in facts_of(part).items():
            source = facts.tied_with if name not in dict(whole.named_parameters()) else name
            expected = shard_of(
                facts.param, whole.get_parameter(source), group.rank(), group.size()
            )
            assert torch.equal(part.get_parameter(name), expected), name


def starts_alike(root: Path, group) -> None:
    """Random weights are the same whole tensors on one rank and here."""
    architecture = build(root).architecture
    whole, ours = build(architecture, seed=3), build(architecture, group=group, seed=3)
    experts = architecture.spec.moe
    if experts is not None and experts.num_experts % group.size() == 0:
        split = dict(build(architecture, expert_group=group, seed=3).named_parameters())
        for name, facts in facts_of(ours).items():
            if "ep" in facts.param.cuts:
                expected = whole.get_parameter(name).chunk(group.size())[group.rank()]
                assert torch.equal(split[name], expected), name
    for name, facts in facts_of(ours).items():
        expected = shard_of(facts.param, whole.get_parameter(name), group.rank(), group.size())
        assert torch.equal(ours.get_parameter(name), expected), name


def generates(root: Path, group) -> None:
    ids, _ = tokens(1, 9)
    prompt = ids[0].tolist()
    expected = generate_ids(build(root), prompt, max_new_tokens=6)
    assert generate_ids(build(root, group=group), prompt, max_new_tokens=6) == expected


def commands(golden_hf: Path, group) -> None:
    """`nanotron-fast generate` on every rank: the first prints what one process would."""
    from transformers import AutoTokenizer  # which other launches of this module do without

    words = AutoTokenizer.from_pretrained(golden_hf)
    prompt = words.decode(list(range(40, 52)))
    ids = words(prompt)["input_ids"]
    # By no group: what a rank alone computes.
    new = generate_ids(build(golden_hf), ids, max_new_tokens=4)
    text = words.decode(new, skip_special_tokens=True)
    flags = ["generate", str(golden_hf), "--prompt", prompt, "--max-new-tokens", "4"]
    split = Mock(wraps=build)
    with patch("nanotron_fast.models.generate.build", split):
        for more in ([], ["--json"]):
            result = CliRunner().invoke(app, [*flags, *more])
            assert result.exit_code == 0, result.output
            if group.rank() > 0:
                assert result.output == ""
            elif more:
                assert json.loads(result.stdout) == {"text": text, "token_ids": new}
            else:
                assert result.stdout == f"{text}\n"
    sizes = [call.kwargs["group"].size() for call in split.call_args_list]
    assert sizes == [group.size()] * 2


def through_a_mesh(root: Path, group) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    by_mesh, by_group = build(root, mesh=mesh), build(root, group=group)
    assert by_mesh.topology == Topology(tp=2)
    for name, parameter in by_mesh.named_parameters():
        assert torch.equal(parameter, by_group.get_parameter(name))
    experts = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    root = root.parent / "glm4_moe"
    by_mesh, by_group = build(root, mesh=experts), build(root, expert_group=group)
    assert by_mesh.topology == Topology(ep=2)
    for name, parameter in by_mesh.named_parameters():
        assert torch.equal(parameter, by_group.get_parameter(name))


def cases_of_copies(roots: Path, group) -> Iterator[tuple[str, Callable[[], None]]]:
    """More ranks than key-value heads."""
    for root in sorted(roots.iterdir()):
        for mode, recompute in (("ALL_REDUCE", "none"), ("REDUCE_SCATTER", "products")):
            title = f"{root.name} {mode} {recompute}"
            yield title, partial(agrees, root, mode, recompute, 0.0, group)
        yield f"{root.name} at random", partial(starts_alike, root, group)
    yield "generation", partial(generates, roots / "llama", group)


def cases(roots: Path, golden_hf: Path, group) -> Iterator[tuple[str, Callable[[], None]]]:
    for root in sorted(roots.iterdir()):
        family = root.name
        weight = 0.1 if family == "qwen2_moe" else 0.0
        for mode, recompute in (("ALL_REDUCE", "products"), ("REDUCE_SCATTER", "layer")):
            title = f"{family} {mode} {recompute}"
            yield title, partial(agrees, root, mode, recompute, weight, group)
        yield f"{family} stages", partial(loads_stage, root, group)
        yield f"{family} at random", partial(starts_alike, root, group)
    for name in ("gpt_oss", "glm4_moe"):
        for recompute in ("none", "layer"):
            case = partial(sends_tokens_to_experts, roots / name, recompute, group)
            yield f"{name}, experts over ranks, {recompute}", case
    yield "all tokens to one rank", partial(one_rank_has_all_tokens, roots / "gpt_oss", group)
    yield "generation", partial(generates, roots / "qwen2", group)
    yield "the command", partial(commands, golden_hf, group)
    yield "mesh", partial(through_a_mesh, roots / "llama", group)


if __name__ == "__main__":
    group = join()
    root = Path(sys.argv[1])
    if sys.argv[2] == "copies":
        run_cases(cases_of_copies(root, group))
    else:
        run_cases(cases(root, Path(sys.argv[2]), group))
