"""One target for each reader of what others wrote: from a few bytes to all that is done with them.

A target keeps a checkpoint in `box/work`, puts the input in the place of one of its files, and does
what a user would do with it. The first byte of an input says which file, or how it is packed, where
there is a choice, so that a mutation may change that too.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import nanotron_fast as nf
from nanotron_fast.checkpoints.inspect import inspect
from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.plan.load import plan_load
from nanotron_fast.checkpoints.reshard import plan as plan_of_reshard
from nanotron_fast.checkpoints.source import read, resolve
from nanotron_fast.errors import CheckpointError, NanotronFastError
from nanotron_fast.formats.safetensors import read_header
from nanotron_fast.formats.torch_file import read_torch_file
from nanotron_fast.formats.yaml_file import read_yaml
from tests.fuzz.oracle import Target
from tests.modelzoo import Tensor, make, safetensors_bytes

TRAINED = Path(__file__).parents[1] / "golden" / "training" / "llama_tied_tp2_zero0" / "2"
RUN = "0a1b2c3d"
# What stands in a journal for the folder that it is made in.
_WORK = b"@WORK@"
# And in a commit for the number of the folder of the content.
_INODE = 4_242_424_242


@functools.cache
def templates() -> Path:
    """Checkpoints to begin with, made once by a process."""
    root = Path(tempfile.mkdtemp(prefix="nanotron_fast-fuzz-"))
    hf = make("llama", num_hidden_layers=1, hidden_size=16, intermediate_size=8).save(
        root / "hf", shards=2
    )
    for name in ("generation_config.json", "tokenizer_config.json"):
        (hf / name).write_text('{"eos_token_id": [1, 2], "add_bos_token": true}')
    nf.convert(hf, root / "nanotron" / "10", topology=nf.Topology(tp=2))
    (root / "nanotron" / "latest.txt").write_text("10")
    nf.convert(hf, root / "dcp", to="dcp", max_shard_size=3000)
    shutil.copy(hf / "config.json", root / "dcp" / "config.json")
    for path in hf.iterdir():
        os.utime(path, (1, 1))  # which a journal names
    shutil.copytree(TRAINED, root / "training")
    nf.reshard(TRAINED, root / "zero", tp=1, dp=2, zero_stage=1)
    return root


def use(root: Path) -> None:
    """Everything that reads a checkpoint, short of its tensors. Raises the first refusal."""
    refusal: Exception | None = None
    calls: tuple[Callable[[], object], ...] = (
        lambda: nf.plan(root, root.parent / "out"),
        lambda: inspect(root),
        lambda: plan_load(read(resolve(root)), {}, 0, Options()),
    )
    for call in calls:
        try:
            call()
        except (NanotronFastError, OSError) as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal


@dataclass(frozen=True)
class Header:
    """A safetensors file; or its header, in a file as long as its length says."""

    name: str = "header"

    def seeds(self) -> list[bytes]:
        """Of two tensors, whole and as a header alone."""
        data = safetensors_bytes(
            {"a": Tensor("F32", (2, 3), bytes(24)), "b": Tensor("BF16", (), bytes(2))}.items(),
            {"format": "pt"},
        )
        size = int.from_bytes(data[:8], "little")
        return [b"\0" + data, b"\1" + data[8 : 8 + size]]

    def run(self, data: bytes, box: Path) -> None:
        """Reads the header."""
        path = box / "work" / "x.safetensors"
        if data[:1] == b"\1":
            data = b"\1" + (len(data) - 1).to_bytes(8, "little") + data[1:] + bytes(26)
        path.write_bytes(data[1:])
        read_header(path)


@dataclass(frozen=True)
class InFolder:
    """A file of a checkpoint, among the others as they should be.

    Args:
        template: the name of the checkpoint.
        files: those that an input may take the place of, by its first byte.
        do: with the checkpoint.
        step: within the checkpoint, what is given to `do`.
    """

    name: str
    template: str
    files: Sequence[str]
    do: Callable[[Path], object] = use
    pack: Callable[[bytes, bytes], bytes] = lambda data, original: data
    unpack: Callable[[bytes], bytes] = lambda original: original

    def seeds(self) -> list[bytes]:
        """The files as they should be."""
        root = templates() / self.template
        return [
            bytes([number]) + self.unpack((root / name).read_bytes())
            for number, name in enumerate(self.files)
        ]

    def run(self, data: bytes, box: Path) -> None:
        """Puts it in its place, does all that there is to do, and puts the original back."""
        root = box / "work" / self.name
        if not root.exists():
            shutil.copytree(templates() / self.template, root)
        name = self.files[(data[0] if data else 0) % len(self.files)]
        path = root / name
        original = path.read_bytes()
        try:
            path.write_bytes(self.pack(data[1:], original))
            self.do(root)
        finally:
            path.write_bytes(original)


def document_of(archive: bytes) -> bytes:
    """The pickle in a file of torch's."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return next(file.read(name) for name in file.namelist() if name.endswith("/data.pkl"))


def with_document(document: bytes, archive: bytes) -> bytes:
    """A file of torch's with another pickle."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, document if name.endswith("/data.pkl") else old.read(name))
    return packed.getvalue()


RATE = "lr_scheduler/lr_scheduler_pp-0-of-1_tp-0-of-2_exp-0-of-1.pt"


@dataclass(frozen=True)
class TorchFile:
    """A file that torch.save writes; or its pickle, in an archive as it should be."""

    name: str = "torch_file"

    def seeds(self) -> list[bytes]:
        """A file of a learning rate; its pickle, and that of a file with tensors."""
        rate = (templates() / "training" / RATE).read_bytes()
        optimizer = (templates() / "training" / OPTIMIZER_FILES[0]).read_bytes()
        return [b"\0" + rate, b"\1" + document_of(rate), b"\1" + document_of(optimizer)]

    def run(self, data: bytes, box: Path) -> None:
        """Reads the document."""
        path = box / "work" / "x.pt"
        content = data[1:]
        if data[:1] == b"\1":
            content = with_document(content, self._small())
        path.write_bytes(content)
        read_torch_file(path)

    @functools.cache  # noqa: B019 - there is one of it
    def _small(self) -> bytes:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as new:
            new.writestr("archive/data.pkl", b"")
            for number in range(8):
                new.writestr(f"archive/data/{number}", bytes(4 if number % 2 else 64))
        return packed.getvalue()


OPTIMIZER_FILES = (
    "optimizer/optimizer_pp-0-of-1_tp-0-of-2_exp-0-of-1.pt",
    "optimizer/optimizer_pp-0-of-1_tp-1-of-2_exp-0-of-1.pt",
)


def reshard_plan(root: Path) -> None:
    """Plans another topology of it, and more ranks of the optimizer."""
    plan_of_reshard(root, root.parent / "out", tp=1, dp=2, zero_stage=1)


@dataclass
class Leftovers:
    """What an earlier conversion has left, gone on with, or given up, or only met.

    The first byte of an input says which file it is in the place of, and what is done.
    """

    name: str = "leftovers"
    files: Sequence[str] = ("journal-0", "commit", "lock")
    _whole: dict[str, bytes] = field(default_factory=dict)

    def _leave(self, work: Path) -> None:
        """A folder as a run leaves it that ended while its content took its place."""
        partial = work / f"out.partial-{RUN}"
        shutil.copytree(templates() / "nanotron" / "10", partial / "content")
        for name in ("config.yaml", "model_config.json"):  # as if they had not been written
            (partial / "content" / name).unlink(missing_ok=True)
        journal = self._journal(work)
        (partial / "journal-0").write_bytes(journal.replace(_WORK, os.fsencode(work)))

    @functools.cached_property
    def _entries(self) -> bytes:
        root = templates() / "nanotron" / "10"
        lines = []
        for path in sorted((root / "model").rglob("*.safetensors")):
            document = {
                "file": str(path.relative_to(root)),
                "size": path.stat().st_size,
                "synced": True,
                "boot": "",
            }
            lines.append(json_line(document))
        return b"".join(lines)

    def _journal(self, work: Path) -> bytes:
        from nanotron_fast.checkpoints.fingerprint import made_by, states_of

        plan = nf.plan(work / "src", work / "out", topology=nf.Topology(tp=2))
        made = made_by(plan, states_of(plan)).to_json()
        line = json_line({"made": made, "share": None, "begun": 1.0})
        return line.replace(os.fsencode(os.path.realpath(work)), _WORK) + self._entries

    def seeds(self) -> list[bytes]:
        """A journal, marks of a result that moves as a whole and in parts, and a lock."""
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            shutil.copytree(templates() / "hf", work / "src")
            journal = self._journal(work)
        commit = {"content": _INODE, "parts": ["model", "nanotron_fast.json"], "before": ["model"]}
        whole = {"content": _INODE, "parts": [], "before": []}
        owner = {
            "run": RUN,
            "host": "elsewhere",
            "boot": "b",
            "namespace": "n",
            "pid": 1,
            "ticks": 1,
            "since": 1.0,
        }
        return [
            *(bytes([kind * 3]) + journal for kind in range(4)),
            *(bytes([1 + kind * 3]) + json_line(commit) for kind in (0, 1, 2)),
            b"\1" + json_line(whole),
            *(bytes([2 + kind * 3]) + json_line(owner) for kind in (0, 1)),
        ]

    def run(self, data: bytes, box: Path) -> None:
        """Meets it: as it is, to go on, and to give it up."""
        work = box / "work" / self.name
        if not (work / "src").exists():
            shutil.copytree(templates() / "hf", work / "src")
        try:
            self._leave(work)
            first = data[0] if data else 0
            name = self.files[first % 3]
            path = work / f"out.partial-{RUN}" / name
            if name == "lock":
                path = work / ".out.nanotron_fast.lock"
            elif name == "commit":
                (path.parent / "replaced").mkdir()
                (path.parent / "replaced" / "model").write_bytes(b"was there")
                (work / "out").mkdir()
                (work / "out" / "nanotron_fast.json").write_bytes(b"{}")
            content = data[1:].replace(_WORK, os.fsencode(os.path.realpath(work)))
            inode = (work / f"out.partial-{RUN}" / "content").stat().st_ino
            path.write_bytes(content.replace(b"%d" % _INODE, b"%d" % inode))
            ways = ({"resume": True}, {}, {"overwrite_partial": True}, {"resume": True})
            way = ways[first // 3 % 4]
            topology = nf.Topology(tp=2)
            nf.convert(work / "src", work / "out", topology=topology, workers=1, **way)
        finally:
            for path in work.iterdir():
                if path.name == "src":
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def json_line(document: object) -> bytes:
    """As a journal has it."""
    return json.dumps(document).encode() + b"\n"


def _resolved(root: Path) -> None:
    with suppress(CheckpointError):
        resolve(root)
    use(root)


def _configured(root: Path) -> None:
    # Asked for the tokenizer that it names, and not where another one lies beside it.
    (root / STEP / "tokenizer_config.json").unlink(missing_ok=True)
    try:
        use(root)
    finally:
        read_yaml(root / STEP / "config.yaml")


STEP = "10/"
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Header(),
        InFolder("hf_index", "hf", ["model.safetensors.index.json"]),
        InFolder(
            "hf_config", "hf", ["config.json", "generation_config.json", "tokenizer_config.json"]
        ),
        InFolder("model_config", "nanotron", [f"{STEP}model_config.json"]),
        InFolder("checkpoint_metadata", "nanotron", [f"{STEP}checkpoint_metadata.json"]),
        InFolder("config_yaml", "nanotron", [f"{STEP}config.yaml"], _configured),
        InFolder("side_file", "nanotron", [f"{STEP}nanotron_fast.json"]),
        InFolder("latest", "nanotron", ["latest.txt"], _resolved),
        InFolder("optimizer_config", "training", ["optimizer/optimizer_config.json"], reshard_plan),
        InFolder("optimizer_runs", "zero", ["optimizer/optimizer_config.json"], reshard_plan),
        InFolder(
            "optimizer_states",
            "training",
            [OPTIMIZER_FILES[0], RATE],
            reshard_plan,
            pack=with_document,
            unpack=document_of,
        ),
        TorchFile(),
        InFolder("dcp_metadata", "dcp", [".metadata"]),
        InFolder("dcp_item", "dcp", ["__0_0.distcp"]),
        Leftovers(),
    )
}
