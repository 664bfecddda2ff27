"""What is said: warnings where the work is done all the same, reasons, and what to give."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import nanotron_fast as nf
from nanotron_fast.cli.reporting import inspection_lines, plan_lines, verification_lines
from nanotron_fast.errors import CheckpointError, ConfigError, TopologyError, UnsupportedModelError
from nanotron_fast.models.architecture import Architecture
from nanotron_fast.units import size
from tests.modelzoo import Tensor, make, read_tensors, write_json
from tests.refusals import refused


def edit(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make("llama", num_hidden_layers=2, tie_word_embeddings=True).save(tmp_path / "hf")


def test_logits_are_run_whatever_differs_but_the_structure(hf: Path, tmp_path: Path) -> None:
    nf.convert(hf, tmp_path / "out")
    edit(tmp_path / "out" / "model_config.json", rope_theta=500.0)
    found = nf.verify(hf, tmp_path / "out", logits=True)
    assert [item.name for item in found.differing] == ["config: rope_theta"]
    assert found.logits is not None
    assert found.logits.max_difference > found.logits.tolerance
    assert "the largest logit is at the same place" in "".join(verification_lines(found))
    assert "logits_not_run" not in found.to_json()
    assert not found.equal


def test_why_logits_were_not_run(hf: Path, tmp_path: Path) -> None:
    nf.convert(hf, tmp_path / "out")
    norm = tmp_path / "out/model/model/decoder/0/pp_block/input_layernorm"
    shutil.move(norm, tmp_path / "moved")
    found = nf.verify(hf, tmp_path / "out", logits=True)
    assert found.logits is None
    assert "input_layernorm.weight is missing" in str(found.no_logits)
    assert f"logits were not run: {found.no_logits}" in list(verification_lines(found))
    assert found.to_json()["logits_not_run"] == found.no_logits
    assert nf.verify(hf, tmp_path / "out").no_logits is None
    other = make("llama", num_hidden_layers=1).save(tmp_path / "other")
    found = nf.verify(hf, other, logits=True)
    assert found.no_logits == "the two are of different structure (num_layers, tie_word_embeddings)"


def test_a_topology_that_is_none(hf: Path, tmp_path: Path) -> None:
    for given, shown in (((2, 1), r"tp=2, pp=1"), ((2,), r"tp=2, pp=\.\.\."), ("2", "tp=")):
        refused(hf, tmp_path, ConfigError, f"give nanotron_fast.Topology.{shown}", topology=given)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~" + "/y" * 3000])
def test_a_tokenizer_by_a_name_that_no_file_has(name: str, hf: Path, tmp_path: Path) -> None:
    nf.convert(hf, tmp_path / "step")
    (tmp_path / "step" / "nanotron_fast.json").unlink()
    path = tmp_path / "step" / "config.yaml"
    document = yaml.safe_load(path.read_text())
    document["tokenizer"] = {"tokenizer_name_or_path": name}
    document["model"]["init_method"] = {"path": name}
    path.write_text(yaml.safe_dump(document))
    report = nf.convert(tmp_path / "step", tmp_path / "back")
    (warning,) = [each for each in report.plan.warnings if "no tokenizer is written" in each]
    assert "which is no folder here" in warning
    assert len(warning) < 1000


def test_patterns_that_match_nothing(hf: Path, tmp_path: Path) -> None:
    extra = {"v_head.weight": Tensor("F32", (1,), b"\0" * 4)}
    make("llama", num_hidden_layers=2, tie_word_embeddings=True).save(hf, extra=extra)
    patterns = ["v_head.*", "w_head.*"]
    report = nf.convert(hf, tmp_path / "out", ignore_tensors=patterns)
    message = "--ignore-tensors w_head.*: no tensor has such a name"
    assert report.plan.warnings == (message,)
    found = nf.verify(hf, tmp_path / "out", ignore_tensors=patterns)
    assert found.equal
    assert found.warnings == (message,)
    warnings = nf.plan(tmp_path / "out", tmp_path / "x", ignore_tensors="w_head.*").warnings
    assert message in warnings


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"metadata": {}, "weight_map": None}])
def test_an_index_of_nothing_beside_the_weights(index: Any, hf: Path, tmp_path: Path) -> None:
    write_json(hf / "model.safetensors.index.json", index)
    report = nf.convert(hf, tmp_path / "out")
    assert "names no tensors: it is left alone" in report.plan.warnings[0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_a_shard_that_is_missing(tied: bool, tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=2, tie_word_embeddings=tied)
    root = model.save(tmp_path / "sharded", shards=2)
    path = root / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    if not tied:
        message = "model-00003-of-00003.safetensors is missing"
    write_json(
        path, {"weight_map": {**places, "lm_head.weight": "model-00003-of-00003.safetensors"}}
    )
    if not tied:
        refused(root, tmp_path, CheckpointError, message)
        return
    report = nf.convert(root, tmp_path / "out")
    (warning,) = [each for each in report.plan.warnings if "lm_head.weight" in each]
    assert "places lm_head.weight in a file that" in warning
    nf.convert(tmp_path / "out", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == model.tensors


def test_inspect_says_that_the_layers_are_not_there(hf: Path) -> None:
    edit(hf / "config.json", num_hidden_layers=5000)
    found = nf.inspect(hf)
    assert "config.json calls for 5,000 layers, and the files hold 20 tensors" in str(found.problem)


def test_an_empty_string_is_not_this_folder(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nanotron, out = tmp_path / "nanotron", tmp_path / "out"
    nf.convert(hf, nanotron, manifest=True)
    runs: list[tuple[str, Path, Callable[[], object]]] = [
        ("the checkpoint", hf, lambda: nf.convert("", out)),
        ("the checkpoint", hf, lambda: nf.verify("", hf)),
        ("the checkpoint", hf, lambda: nf.verify(hf, "")),
        ("the checkpoint", hf, lambda: nf.inspect("")),
        ("the checkpoint", hf, lambda: nf.load_into({}, "", topology=nf.Topology(), rank=0)),
        ("the checkpoint", nanotron, lambda: nf.check_manifest("")),
        ("the checkpoint", nanotron, lambda: nf.reshard("", out)),
        ("the destination", tmp_path, lambda: nf.convert(hf, "")),
        ("the destination", tmp_path, lambda: nf.reshard(nanotron, "")),
        ("--tokenizer", hf, lambda: nf.convert(hf, out, tokenizer="")),
        ("--like", hf, lambda: nf.convert(nanotron, out, like="")),
    ]
    for what, folder, run in runs:
        monkeypatch.chdir(folder)
        with pytest.raises(ConfigError, match=f"^{what}: an empty string names no place"):
            run()
        assert not out.exists()


@pytest.mark.parametrize(
    ("pp", "shown"),
    [
        (1, ["layers 0-1"]),
        (2, ["layers 0-1", "final norm, head, cast to fp32, loss"]),
        (4, ["layers 0", "layers 1", "final norm, head", "cast to fp32, loss"]),
    ],
)
def test_a_stage_without_layers_says_what_it_holds(
    pp: int, shown: list[str], tmp_path: Path
) -> None:
    source = make("llama", num_hidden_layers=2, vocab_size=1024).save(tmp_path / "hf")
    topology = nf.Topology(pp=pp)
    nf.convert(source, tmp_path / "out", topology=topology)
    lines = [f"stage {stage}: {what}" for stage, what in enumerate(shown)]
    for told in (
        plan_lines(nf.plan(source, tmp_path / "more", topology=topology), 1),
        plan_lines(nf.plan(tmp_path / "out", tmp_path / "back"), 1),
        inspection_lines(nf.inspect(tmp_path / "out")),
    ):
        assert [line.strip() for line in told if line.lstrip().startswith("stage ")] == lines


@pytest.mark.parametrize("family", ["llama", "qwen2", "starcoder2"])
@pytest.mark.parametrize("vocab_size", [160, 4096])
def test_stages_without_parameters_are_warned_of(
    family: str, vocab_size: int, tmp_path: Path
) -> None:
    """By the rule of nanotron-fast train, which refuses them, and with a size that it takes."""
    source = make(family, num_hidden_layers=4, vocab_size=vocab_size).save(tmp_path / "hf")
    model = Architecture.of_checkpoint(source)

    def is_taken(pp: int) -> bool:
        try:
            model.blocks_by_stage(nf.Topology(pp=pp))
        except TopologyError:
            return False
        return True

    most = max(pp for pp in range(1, 12) if is_taken(pp))
    refused(source, tmp_path, TopologyError, "would own no block", topology=nf.Topology(pp=12))
    for pp in (most, most + 1):
        told = nf.plan(source, tmp_path / "out", topology=nf.Topology(pp=pp)).warnings
        told = tuple(each for each in told if "no parameters" in each)
        assert bool(told) is (pp > most)
    assert told[0].startswith(f"pp={pp}: stage {most} would have no parameters, by Nanotron's own")
    assert told[0].endswith(f"; with pp={most} every stage has some")
    nf.convert(source, tmp_path / "there")
    again = nf.plan(
        tmp_path / "there", tmp_path / "out", to="nanotron", topology=nf.Topology(pp=pp)
    )
    assert told[0] in again.warnings


def test_what_a_notebook_shows_is_short(hf: Path, tmp_path: Path) -> None:
    out, topology = tmp_path / "out", nf.Topology(tp=2)
    number = f"{nf.inspect(hf).num_elements:,}"
    what = f"llama, {number} parameters in bf16, {hf} (hf) -> nanotron TP=2 PP=1"
    plan = nf.plan(hf, out, topology=topology)
    written = f"{size(plan.bytes_written)} in {len(plan.transfer.outputs)} files"
    assert repr(plan) == f"<Plan: {what}: {written}>"
    report = nf.convert(hf, out, topology=topology)
    assert repr(report) == f"<Report: {what}, {out}: {written}, {report.seconds:.2f} s>"
    back = f"llama, {number} parameters in bf16, {out} (nanotron TP=2 PP=1) -> "
    assert repr(nf.plan(out, tmp_path / "back")).startswith(f"<Plan: {back}hf: ")
    more = nf.plan(out, tmp_path / "back", to="nanotron", topology=nf.Topology(pp=2))
    assert repr(more).startswith(f"<Plan: {back}nanotron TP=1 PP=2: ")
    stored = f"{size(nf.inspect(hf).num_bytes)} in 1 file"
    assert repr(nf.inspect(hf)) == f"<Inspection: {hf}, hf, llama: {number} elements, {stored}>"
    assert repr(nf.inspect(out)).startswith(f"<Inspection: {out}, nanotron TP=2 PP=1, llama: ")
    edit(hf / "config.json", model_type="gpt2")
    assert "'gpt2' is not supported" in repr(nf.inspect(hf))


def test_whose_configuration_it_is(hf: Path, tmp_path: Path) -> None:
    nf.convert(hf, tmp_path / "nanotron")
    config, model_config = hf / "config.json", tmp_path / "nanotron/model_config.json"
    more = "a vocabulary of 5000 is larger than the 160 rows that"
    with pytest.raises(ConfigError, match=f"^--vocab-size: {more} {tmp_path / 'nanotron'} holds$"):
        nf.plan(tmp_path / "nanotron", tmp_path / "out", vocab_size=5000)
    edit(tmp_path / "nanotron/nanotron_fast.json", vocab_size=5000)
    side = f"^{tmp_path / 'nanotron/nanotron_fast.json'}: {more} {tmp_path / 'nanotron'} holds$"
    with pytest.raises(ConfigError, match=side):
        nf.plan(tmp_path / "nanotron", tmp_path / "out")
    other = make("llama", num_hidden_layers=2).save(tmp_path / "other")
    edit(config, hidden_size="64")
    for plan in (lambda: nf.plan(hf, tmp_path / "out"), lambda: nf.verify(other, hf)):
        with pytest.raises(ConfigError, match=f"^{config}: hidden_size is '64', and should be an"):
            plan()
    edit(model_config, is_llama_config=None)
    for plan in (
        lambda: nf.plan(tmp_path / "nanotron", tmp_path / "out"),
        lambda: nf.verify(other, tmp_path / "nanotron"),
    ):
        with pytest.raises(ConfigError, match=f"^{model_config}: none of is_llama_config"):
            plan()


def test_whose_configuration_it_is_in_the_folder_itself(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name as short as `a`, which is in every sentence, is told as any."""
    hf.rename(tmp_path / "a")
    make("llama", num_hidden_layers=2).save(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    nf.convert("a", "model")
    edit(Path("a/config.json"), hidden_size="64")
    edit(Path("model/model_config.json"), is_llama_config=None)
    for folder, file, said in (
        ("a", "config.json", "hidden_size is '64', and should be"),
        ("model", "model_config.json", "none of is_llama_config"),
    ):
        with pytest.raises(ConfigError, match=f"^{folder}/{file}: {said}"):
            nf.verify("other", folder)
    nf.convert("other", "nanotron")
    edit(Path("other/config.json"), rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match=r"^other: rope_scaling 'linear'"):
        nf.plan("other", "out")
    monkeypatch.chdir(tmp_path / "nanotron")
    edit(Path("nanotron_fast.json"), vocab_size=0)
    with pytest.raises(CheckpointError, match=r"^nanotron_fast\.json: vocab_size is 0"):
        nf.plan(".", "out")


@pytest.mark.parametrize(
    ("file", "of_nanotron", "of_dcp"),
    [
        ("config.json", "--like {}: config.json: hidden", "{}/config.json: hidden"),
        ("nanotron_fast.json", "{}: config.json: hidden", "{}: config.json: hidden"),
        ("generation_config.json", "{}/generation_config.json: ", "{}/generation_config.json: "),
    ],
)
def test_whose_configuration_it_is_that_like_names(
    file: str, of_nanotron: str, of_dcp: str, hf: Path, tmp_path: Path
) -> None:
    """Neither a Nanotron checkpoint nor one of DCP has a config.json of its own."""
    for to in ("nanotron", "dcp"):
        nf.convert(hf, tmp_path / to, to=to)
    (tmp_path / "dcp/config.json").unlink()
    like = tmp_path / "like"
    like.mkdir()
    if file == "nanotron_fast.json":
        side = json.loads((tmp_path / "nanotron" / file).read_text())
        side["config"]["hidden_size"] = "64"
        write_json(like / file, side)
    else:
        shutil.copy(hf / "config.json", like)
    if file == "config.json":
        edit(like / file, hidden_size="64")
    if file == "generation_config.json":
        (like / file).write_text("{")
    for source, said in (("nanotron", of_nanotron), ("dcp", of_dcp)):
        with pytest.raises((CheckpointError, ConfigError)) as told:
            nf.plan(tmp_path / source, tmp_path / "out", to="hf", like=like)
        assert str(told.value).startswith(said.format(like))


def test_whose_model_is_refused(hf: Path, tmp_path: Path) -> None:
    edit(hf / "config.json", rope_scaling={"rope_type": "linear", "factor": 2.0})
    refused(hf, tmp_path, UnsupportedModelError, f"^{hf}: rope_scaling 'linear': Nanotron stores")


def test_a_number_that_the_tensors_contradict_is_told_first(hf: Path, tmp_path: Path) -> None:
    edit(hf / "config.json", hidden_size=65, head_dim=8)
    shapes = r"has shape \[160, 64\], config.json calls for \[160, 65\]"
    refused(hf, tmp_path, CheckpointError, f"^{hf}/model.safetensors: model.embed_tokens.*{shapes}")
    # This one is as it says, and Nanotron has none such.
    other = make("llama", num_hidden_layers=1, head_dim=16).save(tmp_path / "other")
    refused(other, tmp_path, UnsupportedModelError, f"^{other}: head_dim 16 is not hidden_size")
