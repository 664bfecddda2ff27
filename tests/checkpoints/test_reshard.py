"""A Nanotron checkpoint at another topology: the same weights, and what lies beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import nanotron_fast as nf
from nanotron_fast import Topology
from nanotron_fast.errors import ConfigError, TopologyError
from tests.modelzoo import make

TOPOLOGIES = [Topology(tp=1, pp=1), Topology(tp=2, pp=1), Topology(tp=2, pp=2), Topology(tp=4)]


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.safetensors")}


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "smollm3", "qwen2_moe", "starcoder2"]
)
def test_is_what_a_conversion_to_that_topology_writes(family: str, tmp_path: Path) -> None:
    source = make(family).save(tmp_path / "hf")
    for index, topology in enumerate(TOPOLOGIES):
        if family == "starcoder2" and topology.tp > 2:
            continue
        nf.convert(source, tmp_path / f"direct{index}", topology=topology)
    for first, second in ((0, 2), (2, 0), (1, 3), (3, 1), (2, 1)):
        old, new = tmp_path / f"direct{first}", tmp_path / f"{first}-{second}"
        if not old.is_dir() or not (tmp_path / f"direct{second}").is_dir():
            continue
        report = nf.convert(old, new, to="nanotron", topology=TOPOLOGIES[second])
        assert report.plan.source_topology == TOPOLOGIES[first]
        expected = tmp_path / f"direct{second}"
        assert files(new) == files(expected)
        for name in ("model_config.json", "checkpoint_metadata.json", "nanotron_fast.json"):
            assert json.loads((new / name).read_text()) == json.loads((expected / name).read_text())
        if family != "starcoder2":
            text = (new / "config.yaml").read_text().replace(str(new), str(expected))
            ours, theirs = (
                yaml.safe_load(text),
                yaml.safe_load((expected / "config.yaml").read_text()),
            )
            theirs["general"]["run"] = ours["general"]["run"] = ""
            assert ours == theirs


def test_a_checkpoint_of_a_training_keeps_what_it_says_of_it(tmp_path: Path, golden: Path) -> None:
    source, new = golden / "training" / "llama_tied_tp2_zero0" / "2", tmp_path / "new"
    report = nf.convert(source, new, to="nanotron", topology=Topology(tp=4, pp=2))
    assert nf.verify(source, new).equal
    (warning,) = (each for each in report.plan.warnings if "left behind" in each)
    assert "optimizer, lr_scheduler, random are left behind" in warning
    assert not (new / "optimizer").exists()
    old_metadata = json.loads((source / "checkpoint_metadata.json").read_text())
    metadata = json.loads((new / "checkpoint_metadata.json").read_text())
    assert metadata == {**old_metadata, "tp": 4}
    document = yaml.safe_load((new / "config.yaml").read_text())
    original = yaml.safe_load((source / "config.yaml").read_text())
    assert document["parallelism"] == {**original["parallelism"], "tp": 4, "pp": 2}
    assert document["model"]["init_method"] == {"path": str(new)}
    for key in ("optimizer", "tokens", "data_stages", "logging"):
        assert document[key] == original[key]
    back = tmp_path / "back"
    nf.convert(new, back, to="nanotron", topology=Topology(tp=2))
    assert files(back).keys() == files(source).keys()


def test_what_cannot_be_is_refused(tmp_path: Path, golden_hf: Path) -> None:
    there = tmp_path / "there"
    nf.convert(golden_hf, there, topology=Topology(tp=2))
    with pytest.raises(TopologyError, match="do not split over tp=3"):
        nf.convert(there, tmp_path / "new", to="nanotron", topology=Topology(tp=3))
    for choice in ({"dtype": "fp32"}, {"max_shard_size": "1GB"}, {"model_class": "qwen2"}):
        with pytest.raises(
            ConfigError, match="has no meaning when writing a Nanotron checkpoint at"
        ):
            nf.convert(there, tmp_path / "new", to="nanotron", **choice)
    assert not (tmp_path / "new").exists()
