"""The files that travel with a checkpoint unread: a tokenizer, a processor, code, templates.

transformers asks for many names, and a tokenizer of its own may name any. So what is known not to
be asked for is left behind (weights, states of training, what people read), and the rest is
carried. Only regular files are: never a pipe, a device, or what /proc shows.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.lfs import HINT, is_pointer
from nanotron_fast.formats.manifest import NAME as MANIFEST
from nanotron_fast.formats.patterns import matches
from nanotron_fast.formats.plain_file import check_plain

# The largest tokenizers have 40 MB; nothing else that is asked for comes near.
MAX_BYTES = 1 << 28
TEMPLATES = "additional_chat_templates"
GENERATE = "custom_generate"
# What folders below the first level have that transformers asks for.
FOLDER_PATTERNS = (f"{TEMPLATES}/*.jinja", f"{GENERATE}/*.py", f"{GENERATE}/*.txt")
# Either format's own: written anew by a conversion, never copied.
_OWN = (
    *("config.json", "generation_config.json", "nanotron_fast.json", "model_config.json"),
    *("checkpoint_metadata.json", "config.yaml", "latest.txt", "model", MANIFEST),
    # Never carried, though a configuration names them.
    *("*.safetensors", "*.index.json", "pytorch_model*.bin", "adapter_config.json"),
)
_WEIGHT_PATTERNS = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml"),
    *("*.onnx", "*.onnx_data", "*.npz", "*.npy", "*.pkl", "*.pickle", "*.tflite", "*.ot"),
    *("*.mlmodel", "*.distcp", "*.tar", "*.gz", "*.zip", "*.nemo", "*.engine"),
    *("params.json", "quantize_config.json", "hf_quant_config.json"),
)
_TRAINING_PATTERNS = (
    *("trainer_state.json", "*_results.json", "events.out.*", "zero_to_fp32.py", "latest"),
    *("*.log", "*.lock", "*.csv", "*.jsonl", "*.parquet", "*.sh", "*.ipynb"),
)
# What people read: model cards, licences, pictures.
_READING_PATTERNS = (
    *("README*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "CHANGELOG*", "CITATION*"),
    *("*.md", "*.rst", "*.pdf", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.html"),
)
_LEFT_PATTERNS = (*_WEIGHT_PATTERNS, *_TRAINING_PATTERNS, *_READING_PATTERNS)
# What need not be fetched from the Hub, whose folder names may begin with anything.
IGNORED_ON_HUB = (*_LEFT_PATTERNS, ".*", "*/*")
# Which of the files that are carried make a tokenizer.
_TOKENIZER_PATTERNS = (
    *("tokenizer*", "tokenization*.py", "vocab*", "merges*", "special_tokens_map*", "*.jinja"),
    *("added_tokens*", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.bpe", "tekken*.json"),
    *("chat_template*", f"{TEMPLATES}/*", "spiece*", "sentencepiece*", "bpe.codes", "*.vocab"),
)
# Without any of these there is nothing that a tokenizer could be made of.
_CORE_PATTERNS = (
    *("tokenizer*", "vocab*", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "tekken*.json"),
)


@dataclass(frozen=True, slots=True)
class Companions:
    """What lies beside a checkpoint's weights, by its path in the folder."""

    # The files of a tokenizer (none, where they would not make one), and all others.
    tokenizer: dict[str, Path]
    others: dict[str, Path]
    # Folders end with a slash. What the conversion reads is not here, nor are hidden files.
    left: tuple[str, ...]
    # Of those that would be carried: links to nothing, and where they point.
    broken: dict[str, str]


def companions(root: Path, config: object = None, *, used: Collection[str] = ()) -> Companions:
    """Sorts the files of a checkpoint's folder. Raises CheckpointError, OSError.

    Args:
        root: the folder, in either format.
        config: the checkpoint's own configuration, which may name files of code (`auto_map`).
        used: names of files and folders that the conversion reads itself.
    """
    named = named_files(root, config)
    carried: dict[str, Path] = {}
    left: list[str] = []
    broken: dict[str, str] = {}
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        name, path = entry.name, root / entry.name
        if name in used or (name.startswith(".") and name not in named):
            continue
        if matches(name, _OWN):
            left.append(f"{name}/" if path.is_dir() else name)
        elif path.is_dir():
            wanted = _in_folder(root, name, named)
            found = [file for file in wanted if _is_carried(root / file)]
            carried.update((file, root / file) for file in found)
            broken.update(_broken(root, wanted))
            if not found:
                left.append(f"{name}/")
        elif name not in named and matches(name, _LEFT_PATTERNS):
            left.append(name)
        elif _is_carried(path):
            carried[name] = path
        else:
            left.append(name)
            broken.update(_broken(root, [name]))
    for name, path in carried.items():
        _check_is_whole(name, path)
    named_by_tokenizer = _named_by(root / "tokenizer_config.json")
    tokenizer = {
        name: path
        for name, path in carried.items()
        if name in named_by_tokenizer or matches(name, _TOKENIZER_PATTERNS)
    }
    if not any(name in named_by_tokenizer or matches(name, _CORE_PATTERNS) for name in tokenizer):
        tokenizer = {}
    others = {name: path for name, path in carried.items() if name not in tokenizer}
    return Companions(tokenizer, others, tuple(left), broken)


def named_files(root: Path, config: object = None) -> frozenset[str]:
    """Paths that a folder's configurations name, there or not."""
    named = _names_in(config)
    for path in sorted(root.glob("*config*.json")):
        if path.name != "config.json":
            named |= _named_by(path)
    return frozenset(named)


def wanted_from_hub(root: Path, config: object = None) -> list[str]:
    """Patterns of what `IGNORED_ON_HUB` leaves out and transformers may ask for all the same."""
    named = sorted(
        name
        for name in named_files(root, config)
        if matches(name, IGNORED_ON_HUB) and not matches(name, _OWN)
    )
    return [*FOLDER_PATTERNS, *map(glob.escape, named)]


def _named_by(path: Path) -> set[str]:
    if not _is_carried(path):
        return set()
    try:
        return _names_in(read_json_object(path))
    except CheckpointError:  # it travels as it is: who asks for it will say what is wrong
        return set()


def _names_in(document: object) -> set[str]:
    """What may be paths of files: every text, and the file of every class."""
    texts = set(_strings(document))
    # "tokenization_x.Tokenizer" and "repository--tokenization_x.Tokenizer" are files of code.
    modules = {text.rpartition("--")[2].rpartition(".")[0] for text in texts if "." in text}
    texts |= {f"{module.replace('.', '/')}.py" for module in modules if module}
    return {text for text in texts if _is_inside(text)}


def _strings(document: object) -> Iterator[str]:
    """Every short text in a document, at any depth: one of them may be the name of a file."""
    pending: list[Any] = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and len(value) < 256:
            yield value
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return "\x00" not in name and all(part not in ("", ".", "..") for part in parts)


def _in_folder(root: Path, folder: str, named: frozenset[str]) -> list[str]:
    """Files of a folder that may be asked for, by their paths from the root."""
    found = {
        path.relative_to(root).as_posix()
        for pattern in FOLDER_PATTERNS
        if pattern.startswith(f"{folder}/")
        for path in root.glob(pattern)
    }
    inside = {name for name in named if name.startswith(f"{folder}/")}
    found |= {name for name in inside if (root / name).is_file() or (root / name).is_symlink()}
    return sorted(found)


def _broken(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Those that are links to nothing, and where they point."""
    links = [name for name in names if (root / name).is_symlink()]
    return {name: os.readlink(root / name) for name in links if not os.path.exists(root / name)}


def _is_carried(path: Path) -> bool:
    """Whether it is a plain file of a sensible size, or a link to one.

    Raises CheckpointError where it is a pipe, a device, or what the kernel makes up.
    """
    try:
        found = os.stat(path)
    except OSError:  # a link to nothing, or in a circle
        return False
    if stat.S_ISDIR(found.st_mode):
        return False
    check_plain(path)
    return found.st_size <= MAX_BYTES


def _check_is_whole(name: str, path: Path) -> None:
    with open(path, "rb") as file:
        if is_pointer(file.read(64)):
            raise CheckpointError(f"{path}: {HINT}")
