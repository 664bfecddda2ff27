"""Against a real server of S3's protocol on the loopback, with a proxy before it that fails."""

from __future__ import annotations

import http.client
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.remote import mirror, store
from nanotron_fast.checkpoints.remote.upload import Upload
from nanotron_fast.errors import CheckpointError, DestinationError
from tests.checkpoints.remote.stores import contents, put
from tests.modelzoo import make

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs")
moto_server = pytest.importorskip(
    "moto.server", reason="moto's server is not installed: pip install 'moto[s3]' flask flask-cors"
)

SRC, DST = "s3://models/llama", "s3://models/out"
# What the proxy does with a request: pass it on, or something else.
Fault = Callable[["Proxy"], bool]


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on, but for those that a test wants to go wrong."""

    protocol_version = "HTTP/1.1"
    port = 0
    fault: Fault | None = None
    lock = threading.Lock()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        cls = type(self)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        with cls.lock:
            is_answered = cls.fault is not None and cls.fault(self)
        if not is_answered:
            self.send(*self.ask())

    def ask(self) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = dict(self.headers)
        connection.request(self.command, self.path, self.body, headers)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, response.getheaders(), data

    def send(
        self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: int | None = None
    ) -> None:
        """Answers; with `cut` so many bytes of the body alone, and ends the connection."""
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = len(data)
        if self.command == "HEAD":
            length = int({name.lower(): value for name, value in headers}.get("content-length", 0))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer


@pytest.fixture(scope="module")
def server() -> Iterator[type[Proxy]]:
    moto = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    Proxy.port = moto.get_host_and_port()[1]
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    Proxy.endpoint = f"http://127.0.0.1:{proxy.server_port}"
    yield Proxy
    proxy.shutdown()
    proxy.server_close()
    moto.stop()


@pytest.fixture
def s3(server: type[Proxy], monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Proxy]]:
    """An empty bucket, which s3fs finds by the environment as users have it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    monkeypatch.setattr(store, "FIRST_PAUSE_SECONDS", 0.001)
    s3fs.S3FileSystem.clear_instance_cache()
    server.fault = None
    fs = s3fs.S3FileSystem()
    fs.mkdir("models")
    yield server
    server.fault = None
    fs.invalidate_cache()
    fs.rm("models", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make("llama", num_hidden_layers=1).save(tmp_path / "model", shards=2)


def is_tensor_read(request: Proxy) -> bool:
    return request.command == "GET" and ".safetensors" in request.path


def test_there_and_back(s3, model, tmp_path):
    put(model, SRC)
    nf.convert(SRC, DST, topology=nf.Topology(tp=2))
    nf.convert(model, tmp_path / "expected", topology=nf.Topology(tp=2))
    found, expected = contents(DST), contents(tmp_path / "expected")
    for each in (found, expected):
        each.pop("config.yaml")
    assert found == expected
    nf.convert(DST, tmp_path / "back")
    assert nf.verify(tmp_path / "back", model).equal
    assert nf.verify(SRC, DST).equal
    assert nf.inspect(DST).path == DST


def test_errors_and_dropped_bodies_are_overcome(s3, model, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "BLOCK_BYTES", 16 << 10)
    put(model, SRC)
    faults = ["500", "drop", "reset", "500", "drop", "slow"]
    done = []

    def fault(request):
        if not is_tensor_read(request) or not faults:
            return False
        kind = faults.pop(0)
        done.append(kind)
        if kind == "500":
            request.send(503, [], b"<Error><Code>SlowDown</Code></Error>")
        elif kind == "drop":
            status, headers, data = request.ask()
            request.send(status, headers, data, cut=len(data) // 2)
        elif kind == "reset":
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
        else:
            time.sleep(0.3)
            return False
        return True

    s3.fault = fault
    nf.convert(SRC, tmp_path / "out")
    s3.fault = None
    assert sorted(done) == ["500", "500", "drop", "drop", "reset", "slow"]
    assert nf.verify(tmp_path / "out", model).equal


def test_uploads_that_fail_are_tried_again(s3, model, tmp_path):
    faults = [503, 500, 503]

    def fault(request):
        if request.command == "PUT" and faults:
            request.send(faults.pop(), [], b"<Error><Code>InternalError</Code></Error>")
            return True
        return False

    s3.fault = fault
    nf.convert(model, DST)
    assert not faults
    assert nf.verify(DST, model).equal


def test_an_object_that_is_replaced_meanwhile_is_an_error(s3, model, tmp_path):
    put(model, SRC)
    name = "model-00002-of-00002.safetensors"
    data = (model / name).read_bytes()
    is_replaced = []
    past_the_proxy = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{s3.port}")

    def fault(request):
        # After its header: it is read from its first byte on.
        if is_tensor_read(request) and name in request.path and not is_replaced:
            begin = request.headers["Range"].removeprefix("bytes=").partition("-")[0]
            if begin != "0":
                past_the_proxy.pipe_file(f"models/llama/{name}", data[:-1] + b"x")
                is_replaced.append(True)
        return False

    s3.fault = fault
    with pytest.raises(CheckpointError, match=rf"{SRC}/{name}: it has changed since"):
        nf.convert(SRC, tmp_path / "out")
    assert is_replaced
    assert not (tmp_path / "out").exists()


def test_a_second_upload_is_refused(s3, model, tmp_path, monkeypatch):
    upload, refusals = Upload._upload, []

    def late(self, path, name):
        if "lm_head" in name and not refusals:
            refusals.append(name)
            with pytest.raises(DestinationError, match="another run is writing to it: proc"):
                nf.convert(model, DST, overwrite=True)
        return upload(self, path, name)

    monkeypatch.setattr(Upload, "_upload", late)
    nf.convert(model, DST)
    assert refusals
    assert nf.verify(DST, model).equal
    assert not [name for name in contents(DST) if "lock-" in name]


def test_a_bucket_that_is_not_there_is_said(s3, tmp_path):
    with pytest.raises((CheckpointError, OSError), match="absent"):
        nf.inspect("s3://absent/model")


def test_a_request_is_tried_as_often_as_is_said(s3, tmp_path):
    """The client has tries of its own, which would multiply them."""
    asked = []

    def fails(request: Proxy) -> bool:
        asked.append(request.path)
        request.send(500, [], b"<Error><Code>InternalError</Code></Error>")
        return True

    s3.fault = fails
    with pytest.raises(OSError, match=f"in {store.NUM_TRIES} tries"):
        nf.inspect(SRC)
    # It asks in one way, and then in another.
    assert len(asked) <= 2 * store.NUM_TRIES


def test_a_key_that_is_missing_or_wrong_is_said_at_once(s3, model, tmp_path, monkeypatch):
    put(model, SRC)
    asked = []

    def forbidden(request: Proxy) -> bool:
        asked.append(request.path)
        request.send(403, [], b"<Error><Code>InvalidAccessKeyId</Code></Error>")
        return True

    s3.fault = forbidden
    with pytest.raises(PermissionError, match="its files cannot be listed: "):
        nf.convert(SRC, tmp_path / "out")
    assert len(asked) < store.NUM_TRIES
    s3.fault = None
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(PermissionError, match="a key is missing or not accepted: Unable to loca"):
        nf.convert(SRC, tmp_path / "out")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    s3fs.S3FileSystem.clear_instance_cache()
