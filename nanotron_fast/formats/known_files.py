"""Which files belong to a checkpoint: those that this tool, Nanotron and transformers write."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.huggingface.companions import named_files
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.manifest import NAME as MANIFEST
from nanotron_fast.formats.nanotron.side_file import NAME as SIDE_FILE
from nanotron_fast.formats.patterns import matches

# What this tool's own folders and files in a destination start with.
OURS = ".nanotron_fast."
# What readers look for first, in the order in which it may appear.
MARKERS = (
    "model.safetensors.index.json",
    "model_config.json",
    "checkpoint_metadata.json",
    ".metadata",
    "config.json",
)
_WEIGHTS = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.*.safetensors"),
    *("adapter_model.safetensors", "consolidated*.safetensors"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    "__[0-9]*_[0-9]*.distcp",
)
_CONFIGS = ("config.json", "model_config.json", "adapter_config.json", ".metadata")
# Names that nothing but a checkpoint has: what merely begins or ends like one may be somebody's.
_PATTERNS = (
    *(*_WEIGHTS, *_CONFIGS),
    *("model.safetensors.index.json", "model.safetensors.index.*.json"),
    *("pytorch_model.bin.index.json", "generation_config.json", "quantize_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("config.yaml", "checkpoint_metadata.json", SIDE_FILE, MANIFEST, "latest.txt"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v[0-9]*"),
    *("*.tiktoken", "spiece.model", "spm.model", "sentencepiece*.model", "source.spm"),
    *("target.spm", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "bpe.codes"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    "chat_template.jinja",
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py", "processing_*.py"),
    *("image_processing_*.py", "feature_extraction_*.py", "modular_*.py"),
    *("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"),
    *("rng_state.pth", "rng_state_[0-9]*.pth", "trainer_state.json"),
    *("all_results.json", "train_results.json", "eval_results.json"),
    *("README", "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"),
    *("USE_POLICY.md", ".gitattributes"),
)
# What the files in a checkpoint's folders are called, by their paths.
_FOLDERS = {
    "model": ("*.safetensors",),
    "optimizer": ("*.pt", "*.json"),
    "lr_scheduler": ("*.pt",),
    "random": ("*.pt",),
    "additional_chat_templates": ("*.jinja",),
    "custom_generate": ("*.py", "*.txt"),
    ".cache": (".cache/huggingface/*",),
}


def foreign_names(
    root: Path, found: Iterable[str], own: Collection[str], *, is_unfinished: bool = False
) -> list[str]:
    """Of the names in a directory, those that no checkpoint has; all, where it is none.

    A checkpoint has what only checkpoints have, what its configurations name, and what a conversion
    to Nanotron's format has noted that it carried. `own` are paths of a new checkpoint, which
    takes the place of its like. `is_unfinished`: it is known that a checkpoint was being written
    there, what marks one may be missing.
    """
    names = list(found)
    if all(name.startswith(OURS) for name in names):
        return []
    if not is_unfinished and not _is_checkpoint(root, names):
        return names
    known = {*own, *_carried(root), *named_files(root, _document(root / "config.json"))}
    return [name for name in names if not _is_known(root, name, known)]


def _is_checkpoint(root: Path, names: Collection[str]) -> bool:
    """Whether a model's configuration is there, or one of some kind beside weights."""
    config = _document(root / "config.json")
    if config.get("model_type") or config.get("architectures"):
        return True
    if not any(name in _CONFIGS for name in names):
        return False
    return any(matches(name, _WEIGHTS) for name in names) or any(
        name.endswith(".safetensors") for name in _paths_in(root, "model")
    )


def _document(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing: what cannot be read says nothing about the files beside it."""
    try:
        return read_json_object(path) if path.is_file() else {}
    except (CheckpointError, OSError):
        return {}


def _carried(root: Path) -> list[str]:
    names = _document(root / SIDE_FILE).get("carried")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _is_known(root: Path, name: str, known: Collection[str]) -> bool:
    if name.startswith(OURS):
        return True
    path = root / name
    if not path.is_dir() or path.is_symlink():
        return name in known or matches(name, _PATTERNS)
    patterns = _FOLDERS.get(name, ())
    if not patterns and not any(each.startswith(f"{name}/") for each in known):
        return False
    return all(each in known or matches(each, patterns) for each in _paths_in(root, name))


def _paths_in(root: Path, folder: str) -> Iterator[str]:
    """Files at any depth, by their paths from the root."""
    for place, _, files in os.walk(root / folder):
        for file in files:
            yield (Path(place) / file).relative_to(root).as_posix()
