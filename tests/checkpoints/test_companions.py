"""The small files that travel with a checkpoint, there and back, and what stays behind."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast.checkpoints import source as sources
from nanotron_fast.cli.reporting import report_lines
from nanotron_fast.errors import CheckpointError, DestinationError
from nanotron_fast.formats.huggingface import companions as layout
from nanotron_fast.formats.huggingface.companions import companions
from tests.modelzoo import make, write_json

CARRIED = {
    "tokenizer.json": b"{}",
    "tokenizer_config.json": json.dumps(
        {
            "auto_map": {"AutoTokenizer": ["custom.MyTokenizer", None]},
            "vocab_file": "words.bin",
            "sub": [{"file": "extra/pieces.dat"}],
        }
    ).encode(),
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
    "chat_template.jinja": b"{{ messages }}",
    "custom.py": b"class MyTokenizer: ...",
    "helper.py": b"",
    "custom_generate/generate.py": b"",
    "custom_generate/requirements.txt": b"",
    "tokenization_own.py": b"",
    "modeling_own.py": b"",
    "qwen.tiktoken": b"aa 0",
    "tokenizer.model": b"\x0a\x00",
    "tokenizer.model.v3": b"\x0a\x01",
    "source.spm": b"\x0a",
    "processor_config.json": b"{}",
    "preprocessor_config.json": b"[not json",
    "words.bin": b"words",
    "extra/pieces.dat": b"pieces",
    "merges.txt": b"a b",
    "a_name_of_their_own": b"x",
}
LEFT = {
    "README.md": b"# A model",
    "LICENSE": b"",
    "pytorch_model.bin": b"",
    "consolidated.00.pth": b"",
    "optimizer.pt": b"",
    "scheduler.pt": b"",
    "rng_state_0.pth": b"",
    "training_args.bin": b"",
    "trainer_state.json": b"{}",
    "all_results.json": b"{}",
    "other.safetensors": b"",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"",
    "model_config.json.bak/x": b"",
}


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make("llama", num_hidden_layers=1).save(tmp_path / "source")


def files_of(root: Path) -> dict[str, bytes]:
    paths = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def test_all_that_may_be_asked_for_goes_there_and_back(source: Path, tmp_path: Path) -> None:
    put(source, CARRIED)
    put(source, LEFT)
    put(source, {".gitattributes": b""})
    report = nanotron_fast.convert(source, tmp_path / "there", fsync=True)
    assert CARRIED.items() <= files_of(tmp_path / "there").items()
    assert not LEFT.keys() & files_of(tmp_path / "there").keys()
    names = {name.split("/")[0] + "/" * ("/" in name) for name in LEFT}
    assert set(report.plan.left_behind) == names
    assert report.to_json(1)["left_behind"] == list(report.plan.left_behind)
    (line,) = [line for line in report_lines(report) if line.startswith("left behind: ")]
    assert "LICENSE, README.md, all_results.json" in line
    assert "and 4 more" in line
    report = nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    assert report.plan.left_behind == ()
    expected = {*CARRIED, "config.json", "model.safetensors"}
    assert files_of(tmp_path / "back").keys() == expected
    assert CARRIED.items() <= files_of(tmp_path / "back").items()


def test_what_auto_map_of_the_config_names(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    names = {"AutoConfig": "code.own.Config", "AutoModel": "org/name--modeling_far.Model"}
    write_json(source / "config.json", {**config, "auto_map": names})
    put(source, {"code/own.py": b"# own", "code/unused.py": b"", "modeling_far.py": b""})
    nanotron_fast.convert(source, tmp_path / "there")
    nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    assert (tmp_path / "back" / "code" / "own.py").read_bytes() == b"# own"
    assert (tmp_path / "back" / "modeling_far.py").is_file()


def test_what_was_carried_may_be_replaced(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {**config, "auto_map": {"AutoModel": "code.own.Model"}})
    files = {name: data for name, data in CARRIED.items() if not name.startswith("extra/")}
    put(source, {**files, "code/own.py": b"# own"})
    nanotron_fast.convert(source, tmp_path / "there")
    nanotron_fast.convert(source, tmp_path / "there", overwrite=True)
    put(tmp_path / "there", {"code/notes.txt": b"mine"})
    with pytest.raises(DestinationError, match="there is more in it: code"):
        nanotron_fast.convert(source, tmp_path / "there", overwrite=True)


def test_no_name_leads_out_of_the_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    named = ["../secret.txt", str(tmp_path / "secret.txt"), "a/../../secret.txt", "a\0b", ".", ""]
    write_json(source / "tokenizer_config.json", {"files": named})
    found = companions(source)
    assert [*found.tokenizer, *found.others] == ["tokenizer_config.json"]


def test_a_configuration_cannot_name_weights_or_our_own_files(source: Path) -> None:
    names = ["model.safetensors", "pytorch_model.bin", "config.yaml", "adapter_config.json"]
    write_json(source / "tokenizer_config.json", {"files": names})
    put(source, dict.fromkeys(names[1:], b"{}"))
    found = companions(source, used={"config.json"})
    assert [*found.tokenizer, *found.others] == ["tokenizer_config.json"]
    assert set(found.left) == set(names)


def test_links_to_nothing_are_left(source: Path) -> None:
    (source / "tokenizer.model").symlink_to("gone")
    (source / "added_tokens.json").symlink_to("added_tokens.json")
    found = companions(source, used={"config.json", "model.safetensors"})
    assert (found.tokenizer, found.others) == ({}, {})
    assert found.left == ("added_tokens.json", "tokenizer.model")
    assert found.broken == {"added_tokens.json": "added_tokens.json", "tokenizer.model": "gone"}


def broken(warnings: tuple[str, ...]) -> list[str]:
    return [each for each in warnings if "where nothing is" in each]


def test_a_tokenizer_that_is_a_link_to_nothing(source: Path, tmp_path: Path) -> None:
    """As in a cache of the Hub's whose blobs were removed."""
    (source / "README.md").symlink_to("../../blobs/0")
    nanotron_fast.convert(source, tmp_path / "whole")
    for folder in (source, tmp_path / "whole"):
        (folder / "tokenizer.json").symlink_to("../../blobs/1")
        (warning,) = broken(nanotron_fast.plan(folder, tmp_path / "out").warnings)
        assert warning.startswith(f"{folder}/tokenizer.json is a link to ../../blobs/1, where")
    for to in ("dcp", "nanotron"):
        folder = source if to == "dcp" else tmp_path / "whole"
        assert len(broken(nanotron_fast.plan(folder, tmp_path / "out", to=to).warnings)) == 1
    put(tmp_path / "other", {"tokenizer.json": b"{}"})
    plan = nanotron_fast.plan(source, tmp_path / "out", tokenizer=tmp_path / "other")
    assert not broken(plan.warnings)


def test_links_to_nothing_in_folders(source: Path, tmp_path: Path) -> None:
    put(source, {"additional_chat_templates/a.jinja": b"a", "auto/code.py": b""})
    (source / "additional_chat_templates" / "b.jinja").symlink_to("../../blobs/1")
    (source / "auto" / "more.py").symlink_to("../../blobs/2")
    (source / "auto" / "else.py").symlink_to("../../blobs/3")
    named = {"tokenizer_class": "auto/more.py", "auto_map": {"AutoTokenizer": "auto/code.py"}}
    write_json(source / "tokenizer_config.json", named)
    plan = nanotron_fast.plan(source, tmp_path / "out")
    assert {"additional_chat_templates/a.jinja", "auto/code.py"} <= {*plan.copies}
    told = broken(plan.warnings)
    assert [each.partition(" is a link to ")[0] for each in told] == [
        f"{source}/{name}" for name in ("additional_chat_templates/b.jinja", "auto/more.py")
    ]


@pytest.mark.parametrize("target", ["/proc/self/status", "/dev/zero", None])
def test_special_files_are_refused(target: str | None, source: Path) -> None:
    if target is None:
        os.mkfifo(source / "vocab.txt")
    else:
        (source / "vocab.txt").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"vocab.txt: it is .* not a plain file"):
        companions(source)


def test_a_file_too_large_is_left(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_BYTES", 3)
    put(source, {"tokenizer.json": b"1234", "vocab.txt": b"123"})
    found = companions(source, used={"config.json", "model.safetensors"})
    assert ([*found.tokenizer], found.left) == (["vocab.txt"], ("tokenizer.json",))


def test_links_to_regular_files_are_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    nanotron_fast.convert(source, tmp_path / "there")
    assert not (tmp_path / "there" / "tokenizer.json").is_symlink()
    assert (tmp_path / "there" / "tokenizer.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["tokenizer.model", "config.json", "model.safetensors"])
def test_a_git_lfs_pointer(name: str, source: Path, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n"
    (source / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=f'{name}: a git-lfs pointer.*run "git lfs pull"'):
        nanotron_fast.convert(source, tmp_path / "there")
    assert not (tmp_path / "there").exists()


class Hub:
    """Stands for huggingface_hub: a folder is a repository, and what is fetched is copied."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache

    def snapshot_download(self, hub_id: str, revision: str | None = None, **patterns: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        assert hub_id == "org/name"
        assert revision in (None, self.cache.name)
        names = [path.relative_to(self.repository) for path in self.repository.rglob("*.*")]
        for name in filter_repo_objects([str(name) for name in names], **patterns):
            if (self.repository / name).is_file():
                put(self.cache, {name: (self.repository / name).read_bytes()})
        return str(self.cache)


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    put(source, CARRIED)
    put(source, LEFT)
    found = Hub(source, tmp_path / "0123abc")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    return found


def test_the_same_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    nanotron_fast.convert("org/name", tmp_path / "there")
    there = files_of(tmp_path / "there")
    assert {name: data for name, data in CARRIED.items() if "." in name}.items() <= there.items()
    assert not {"pytorch_model.bin", "README.md", "optimizer.pt"} & files_of(hub.cache).keys()


def test_no_weights_are_fetched_for_a_tokenizer(hub: Hub) -> None:
    root = sources.resolve_companions("org/name")
    found = files_of(root)
    assert {"tokenizer.json", "words.bin", "additional_chat_templates/tool_use.jinja"} <= set(found)
    assert not [name for name in found if name.endswith(".safetensors")]
