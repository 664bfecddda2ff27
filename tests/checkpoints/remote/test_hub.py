"""Against a server on the loopback that answers as the Hub does: a repository and its commits."""

from __future__ import annotations

import http.server
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
from huggingface_hub import HfFileSystem

import nanotron_fast as nf
from nanotron_fast.checkpoints.remote import store
from nanotron_fast.checkpoints.source import resolve_companions
from nanotron_fast.errors import CheckpointError
from tests.modelzoo import make

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(http.server.BaseHTTPRequestHandler):
    """Two revisions of org/model. A branch may be moved meanwhile."""

    protocol_version = "HTTP/1.1"
    folders: dict[str, Path]
    branches: dict[str, str]
    # Whether the branch moves when the first file is asked for.
    moves: bool

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/org/model(?:/revision/([^/]+))?", path):
            commit = self.commit(match[1] or "main")
            return self.answer({"id": "org/model", "sha": commit, "siblings": []}, commit)
        if match := re.fullmatch(r"/api/models/org/model/tree/([^/]+)/?(.*)", path):
            commit = self.commit(match[1])
            return self.answer([] if commit is None else self.tree(self.folders[commit]), commit)
        if match := re.fullmatch(r"/org/model/resolve/([^/]+)/(.+)", path):
            commit = self.commit(match[1])
            if commit is not None:
                if self.moves:
                    self.branches["main"] = COMMITS["v1"]
                return self.send(self.folders[commit] / match[2], commit)
        return self.answer({"error": "Repository not found"}, None)

    do_HEAD = do_GET

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.folders else self.branches.get(revision)

    def tree(self, folder: Path) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name}
            for path in sorted(folder.iterdir())
        ]

    def answer(self, document: object, commit: str | None) -> None:
        data = json.dumps(document).encode()
        self.send_response(404 if commit is None else 200)
        if commit is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send(self, path: Path, commit: str) -> None:
        data = path.read_bytes()
        begin, end = 0, len(data) - 1
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            begin, end = int(match[1]), min(int(match[2]), end)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(end + 1 - begin))
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{path.name}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[begin : end + 1])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.folders = {
        commit: make("llama", seed=seed, num_hidden_layers=1).save(
            tmp_path / f"at-{name}", shards=2
        )
        for seed, (name, commit) in enumerate(COMMITS.items())
    }
    Hub.branches = dict(COMMITS)
    Hub.moves = False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    HfFileSystem.clear_instance_cache()
    yield Hub
    server.shutdown()
    server.server_close()
    HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_a_revision_is_read_by_ranges(hub, tmp_path, revision):
    url = "hf://org/model" + ("" if revision == "main" else f"@{revision}")
    nf.convert(url, tmp_path / "out")
    assert nf.verify(tmp_path / "out", hub.folders[COMMITS[revision]]).equal


def test_a_branch_that_moves_meanwhile_changes_nothing(hub, tmp_path):
    hub.moves = True
    nf.convert("hf://org/model", tmp_path / "out")
    assert hub.branches["main"] == COMMITS["v1"]
    assert nf.verify(tmp_path / "out", hub.folders[COMMITS["main"]]).equal


def test_a_model_that_is_not_there_is_said(hub, tmp_path):
    with pytest.raises((OSError, ValueError), match="hf://org/absent"):
        nf.convert("hf://org/absent", tmp_path / "out")


def test_why_the_hub_gives_nothing_is_said_plainly(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    name = "no such directory, and it cannot be had from the Hub"

    def said(hub_id: str, **more: str) -> str:
        with pytest.raises(CheckpointError) as caught:
            resolve_companions(hub_id, **more)
        return str(caught.value)

    assert said("org/absent") == (
        f"org/absent: {name}: there is no such model, or none that you may read"
    )
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    found = said("org/absent")
    assert found == f"org/absent: {name}: it does not answer: Connection refused"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert said("org/absent") == f"org/absent: {name}: HF_HUB_OFFLINE keeps it from being asked"


def test_a_hub_that_may_not_be_asked_is_told_at_once(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(store.time, "sleep", lambda _: pytest.fail("it was tried again"))
    told = "the Hub does not answer: HF_HUB_OFFLINE keeps it from being asked: 'hf://org/model'"
    with pytest.raises(OSError, match=re.escape(told)):
        nf.inspect("hf://org/model")
