"""Generation: transformers' own tokens, from either format, and what the command prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from typer.testing import CliRunner

import nanotron_fast as nf
from nanotron_fast.cli.commands import app
from nanotron_fast.errors import CheckpointError, ConfigError, MissingPackageError, TopologyError
from nanotron_fast.models import build
from nanotron_fast.models.generate import Sampling, generate, generate_ids
from tests.families import zoo
from tests.models.tiny import save, tokens

CASES = {
    "llama": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention_bias": True},
    "mistral": {"sliding_window": 5},
    "smollm3": {},
    "starcoder2": {"sliding_window": 5},
    "qwen2_moe": {"num_hidden_layers": 2},
}


@pytest.mark.parametrize("family", CASES)
def test_greedy_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    root = save(tmp_path / "hf", family, **CASES[family])
    ids, _ = tokens(1, 7)
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 7:].tolist()
    assert len(set(expected)) > 2
    decoder = build(root)
    assert generate_ids(decoder, ids[0].tolist(), max_new_tokens=12) == expected
    stopped = generate_ids(decoder, ids[0].tolist(), max_new_tokens=12, stops={expected[3]})
    assert stopped == expected[: expected.index(expected[3]) + 1]


def test_experts_that_are_split_over_ranks_are_joined(tmp_path: Path) -> None:
    """One process generates, and compares logits, from a checkpoint of several ranks."""
    root = zoo.save("mixtral", tmp_path / "hf")
    nf.convert(root, tmp_path / "split", topology=nf.Topology(tp=2, pp=2, ep=2))
    ids, _ = tokens(1, 7)
    expected = generate_ids(build(root), ids[0].tolist(), max_new_tokens=5)
    assert generate_ids(build(tmp_path / "split"), ids[0].tolist(), max_new_tokens=5) == expected
    assert nf.verify(root, tmp_path / "split", logits=True).equal
    with pytest.raises(TopologyError, match="an expert group of 1 ranks for TP=1 PP=1 EP=2"):
        build(root, topology=nf.Topology(ep=2), rank=0)(ids)


def test_the_command_prints_the_new_tokens_from_either_format(
    tmp_path: Path, golden_hf: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(golden_hf)
    prompt = words.decode(list(range(40, 52)))
    ids = words(prompt, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(golden_hf, dtype=torch.float32)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    new = expected[0, ids.shape[1] :].tolist()
    stored = tmp_path / "nanotron"
    nf.convert(golden_hf, stored, topology=nf.Topology(tp=2, pp=2))
    flags = ["--prompt", prompt, "--max-new-tokens", "5", "--json"]
    for root in (golden_hf, stored):
        result = CliRunner().invoke(app, ["generate", str(root), *flags])
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found == {"text": words.decode(new, skip_special_tokens=True), "token_ids": new}
    refused = CliRunner().invoke(app, ["generate", str(golden_hf), *flags, "--top-p", "2"])
    assert refused.exit_code == 2
    assert refused.stderr == "error: --top-p 2.0: it should be above 0, and at most 1\n"


def test_the_command_with_json_shows_no_bar(
    golden_hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    base = ["generate", str(golden_hf), "--prompt", "a", "--max-new-tokens", "2"]
    for flags, is_shown in (([], True), (["--json"], False)):
        app([*base, *flags], standalone_mode=False)
        assert ("generating" in capsys.readouterr().err) is is_shown


def test_sampling_draws_by_the_probabilities_that_are_left() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(sampling: Sampling) -> list[float]:
        drawn = [sampling.choose(logits, generator) for _ in range(4000)]
        return [drawn.count(token) / 4000 for token in range(4)]

    assert shares(Sampling(temperature=1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    # The first two have 0.8 together, which is not yet 0.9.
    assert shares(Sampling(temperature=1.0, top_p=0.9)) == pytest.approx(
        [0.526, 0.316, 0.158, 0.0], abs=0.03
    )
    assert shares(Sampling(temperature=1.0, top_p=0.4)) == [1.0, 0.0, 0.0, 0.0]
    assert shares(Sampling(temperature=0.05))[0] > 0.99
    assert shares(Sampling()) == shares(Sampling(temperature=0.0)) == [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="--temperature -1: it should be 0 or more"):
        Sampling(temperature=-1)
    with pytest.raises(ConfigError, match="--top-p 0: it should be above 0"):
        Sampling(temperature=1.0, top_p=0)


def test_a_missing_package_is_named_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingPackageError, match=r"needs s3fs, .*'nanotron_fast\[s3\]'"):
        generate("no-such", "a", tokenizer="s3://bucket/a")


def test_no_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    root = save(tmp_path / "hf", "llama", max_position_embeddings=16)
    decoder = build(root)
    counted: list[int] = []
    found = generate_ids(decoder, [3] * 10, max_new_tokens=6, on_token=counted.append)
    assert len(found) == 6
    assert counted == [1, 2, 3, 4, 5, 6]
    message = (
        r"--max-new-tokens 7: the prompt takes 10 of the model's 16 positions "
        r"\(max_position_embeddings\), which leaves 6$"
    )
    with pytest.raises(ConfigError, match=message):
        generate_ids(decoder, [3] * 10, max_new_tokens=7)
    with pytest.raises(ConfigError, match=r"17 tokens, and the model 16 .*: shorten it"):
        generate_ids(decoder, [3] * 17, max_new_tokens=0)
    # With dynamic scaling the frequencies follow the length.
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    longer = save(tmp_path / "x", "llama", max_position_embeddings=16, rope_scaling=scaling)
    assert len(generate_ids(build(longer), [3] * 10, max_new_tokens=7)) == 7
    # With these a configuration states the length before they stretch it, or the one after.
    for kind, stated, original, room, told in (
        ("linear", 16, {}, 32, " and rope_scaling"),
        ("yarn", 16, {"original_max_position_embeddings": 16}, 32, " and rope_scaling"),
        ("yarn", 32, {"original_max_position_embeddings": 16}, 32, ""),
    ):
        scaling = {"rope_type": kind, "factor": 2.0, **original}
        changes = {"max_position_embeddings": stated, "rope_scaling": scaling}
        stretched = build(save(tmp_path / f"{kind}{stated}", "llama", **changes))
        assert len(generate_ids(stretched, [3] * 30, max_new_tokens=2)) == 2
        message = rf"{room} positions \(max_position_embeddings{told}\), which leaves 2$"
        with pytest.raises(ConfigError, match=message):
            generate_ids(stretched, [3] * 30, max_new_tokens=3)
    # A model none of whose layers turns anything knows no positions.
    changes = {"num_hidden_layers": 2, "no_rope_layers": [0, 0]}
    endless = save(tmp_path / "y", "smollm3", max_position_embeddings=16, **changes)
    assert len(generate_ids(build(endless), [3] * 10, max_new_tokens=7)) == 7


def test_positions_are_counted_before_weights_are_read(
    golden_hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanotron_fast.models.generate.build", None)
    flags = ["--prompt", "text", "--max-new-tokens", "99999", "--json"]
    refused = CliRunner().invoke(app, ["generate", str(golden_hf), *flags])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: --max-new-tokens 99999: the prompt takes ")


def test_what_cannot_be_continued_is_said(tmp_path: Path, golden_hf: Path) -> None:
    root = save(tmp_path / "hf", "llama")
    decoder = build(root)
    with pytest.raises(ConfigError, match="the prompt has no tokens"):
        generate_ids(decoder, [], max_new_tokens=3)
    with pytest.raises(ConfigError, match="token 96, and the model 96 tokens"):
        generate_ids(decoder, [3, 96], max_new_tokens=3)
    with pytest.raises(ConfigError, match="a decoder of all layers"):
        generate_ids(build(root, blocks=["embedding", 0]), [3], max_new_tokens=3)
    with pytest.raises(CheckpointError, match=r"hf: there is no tokenizer in it.*; --tokenizer"):
        generate(root, "text")
    with pytest.raises(CheckpointError, match=r"hf: there is no tokenizer in it [^;]*$"):
        generate(golden_hf, "text", tokenizer=root)
    fsspec.filesystem("memory").pipe("/bucket/tokens/a.txt", b"a")
    with pytest.raises(CheckpointError, match=r"^memory://bucket/tokens: there is no tokenizer"):
        generate(golden_hf, "text", tokenizer="memory://bucket/tokens")
    found = generate(golden_hf, "text", max_new_tokens=0, tokenizer=golden_hf)
    assert found.to_json() == {"text": "", "token_ids": []}
