"""Which files of a Hugging Face folder hold its tensors: those that transformers would load.

transformers loads the file that `transformers_weights` of config.json names; else
model.safetensors; else what the index names. So an index that lies beside model.safetensors is
never read, though its shards may be another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.hints import hint
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.plain_file import is_file_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
EXPLICIT = "transformers_weights"

# File names, each with the tensors that an index places in it (None without an index).
Files = dict[str, set[str] | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """The files to read, the index that names them, and what else claims to be the weights."""

    files: Files
    index: str = INDEX
    # Whole shards of an index beside model.safetensors: they must hold the same.
    rival: Files | None = None
    warnings: tuple[str, ...] = ()
    # The head, where the index places it alone in a file that is not there.
    absent: str | None = None


def choose_files(root: Path, config: Mapping[str, Any]) -> Choice:
    """Finds the tensor files. Raises CheckpointError, OSError."""
    explicit = config.get(EXPLICIT)
    if explicit is not None:
        return _explicit(root, explicit, config)
    has_single, has_index = (root / SINGLE).is_file(), (root / INDEX).is_file()
    if has_single and has_index:
        return _single_beside_index(root)
    if has_single:
        return Choice({SINGLE: None})
    if has_index:
        return _sharded(root, INDEX, config)
    raise CheckpointError(f"{root}: {_no_weights(root)}")


def _sharded(root: Path, index: str, config: Mapping[str, Any]) -> Choice:
    files = indexed_files(root, index)
    absent: str | None = None
    if config.get("tie_word_embeddings") is not False:
        # A head that is tied is wherever the embedding is, whatever the index says.
        heads = [name for name in files if files[name] == {HEAD} and not (root / name).is_file()]
        if len(heads) < len(files):
            for name in heads:
                del files[name]
                absent = HEAD
    _check_present(root, index, files)
    return Choice(files, index, absent=absent)


def _explicit(root: Path, name: object, config: Mapping[str, Any]) -> Choice:
    key = f"{root}: {EXPLICIT} of config.json is {name!r}"
    if not is_file_name(name) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{key}, which is not the name of a safetensors file or index")
    if not (root / name).is_file():
        raise CheckpointError(f"{key}, which is not there")
    if name.endswith(".safetensors"):
        return Choice({name: None})
    return _sharded(root, name, config)


def _single_beside_index(root: Path) -> Choice:
    if not read_json_object(root / INDEX).get("weight_map", {}):
        return Choice(
            {SINGLE: None},
            warnings=(
                f"{root / INDEX} names no tensors: it is left alone, and {SINGLE} beside it is "
                "read, which is what transformers loads",
            ),
        )
    files = indexed_files(root, INDEX)
    if set(files) == {SINGLE}:
        return Choice(files)
    gone = [name for name in files if not (root / name).is_file()]
    if not gone:
        return Choice({SINGLE: None}, rival=files)
    return Choice(
        {SINGLE: None},
        warnings=(
            f"{root / INDEX} places tensors in {gone[0]}, which is not there: it is left alone, "
            f"and {SINGLE} beside it is read, which is what transformers loads",
        ),
    )


def indexed_files(root: Path, index: str) -> Files:
    """The files that an index names, there or not. Raises CheckpointError."""
    weight_map = read_json_object(root / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{root / index}: no weight_map that maps tensors to files")
    files: Files = {}
    for tensor, name in weight_map.items():
        wanted = files.get(name) if isinstance(name, str) else None
        if wanted is None:
            if not is_file_name(name):
                raise CheckpointError(
                    f"{root / index}: {tensor} is placed in {name!r}, which is not a file name"
                )
            wanted = files[name] = set()
        wanted.add(tensor)
    return files


def _check_present(root: Path, index: str, files: Files) -> None:
    gone = [name for name in files if not (root / name).is_file()]
    if gone:
        more = f" (so are {len(gone) - 1} more of {len(files)})" if len(gone) > 1 else ""
        raise CheckpointError(
            f"{root}: {gone[0]} is missing{more}; {index} places tensors in it. Fetch the rest of "
            "the checkpoint"
        )


def _no_weights(root: Path) -> str:
    legacy = sorted(path.name for path in root.glob("pytorch_model*.bin*"))
    if legacy:
        return (
            f"the weights are in {legacy[0]}, a pickle that can run code when it is "
            'read. Save them as safetensors first: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{root}', torch_dtype='auto')"
            ".save_pretrained('NEW_DIRECTORY')\""
        )
    shards = sorted(path.name for path in root.glob("model-*-of-*.safetensors"))
    if shards:
        return (
            f"{shards[0]} is there, and {INDEX}, which says what each shard holds, is missing. "
            "Fetch it too"
        )
    variants = sorted(path.name for path in root.glob("model.*.safetensors*"))
    if variants:
        return (
            f"no {SINGLE} and no {INDEX}, only {variants[0]}, which transformers loads when its "
            f"variant {variants[0].split('.')[1]!r} is asked for. Put that variant's files into a "
            "folder of their own, under names without it"
        )
    return hint(root) or (
        f"neither {SINGLE} nor {INDEX} is there, so there are no weights beside config.json"
    )
