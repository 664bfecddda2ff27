"""Folders that hold no checkpoint, but stand near one: what each is, and what would do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nanotron_fast.formats.dcp import METADATA, is_dcp_checkpoint

_NUM_SHOWN = 3
# What other programs keep weights in, and what makes safetensors of it.
_OTHER_FORMATS = (
    (
        "*.gguf",
        "GGUF file: AutoModelForCausalLM.from_pretrained(DIR, gguf_file=FILE) and save_pretrained "
        "make a checkpoint of it, if it is not quantised",
    ),
    (
        "consolidated*.pth",
        "file in Meta's own layout: transformers' convert_llama_weights_to_hf.py makes a "
        "checkpoint of it",
    ),
    (
        "consolidated*.safetensors",
        "file in Mistral's own layout: transformers' convert_mistral_weights_to_hf.py makes a "
        "checkpoint of it",
    ),
    ("tf_model*.h5", "file of TensorFlow's: save it with transformers 4 and from_tf=True"),
    ("flax_model*.msgpack", "file of Flax's: save it with transformers 4 and from_flax=True"),
    ("*.onnx", "file of ONNX: start from the model that it was exported from"),
)


def hint(root: Path) -> str | None:
    """What a folder without a checkpoint is, and what to name instead; None where it is nothing."""
    for look in (_cache, _adapter, _deepspeed, _sharded, _inside_step, _steps, _trainer, _others):
        found = look(root)
        if found is not None:
            return found
    return None


def _children(root: Path, matches: Callable[[Path], bool]) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and matches(path))


def _cache(root: Path) -> str | None:
    """A model's folder in the Hub's cache: `models--org--name`."""
    snapshots = root / "snapshots"
    if not root.name.startswith("models--") or not snapshots.is_dir():
        return None
    hub_id = "/".join(root.name.split("--")[1:])
    branch = root / "refs" / "main"
    commit = branch.read_text(errors="replace").strip() if branch.is_file() else ""
    revisions = _children(snapshots, lambda _: True)
    if commit and snapshots / commit in revisions:
        revisions = [snapshots / commit]
    where = f"name {revisions[-1]}, or " if revisions else "name "
    return f"a model's folder in the Hub's cache: {where}the model's id {hub_id}"


def _adapter(root: Path) -> str | None:
    path = root / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_bytes()).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError):
        base = None
    on = f" of {base}" if isinstance(base, str) else ""
    return (
        f"an adapter (LoRA){on}, without the model's own weights. Merge it first: "
        f"AutoPeftModelForCausalLM.from_pretrained({str(root)!r}).merge_and_unload()"
        ".save_pretrained(NEW), and convert NEW"
    )


def _deepspeed(root: Path) -> str | None:
    steps = _children(root, lambda path: path.name.startswith("global_step"))
    has_states = any(root.glob("*mp_rank_*_model_states.pt"))
    if not steps and not has_states and not (root / "zero_to_fp32.py").is_file():
        return None
    folder = root.parent if has_states else root
    return (
        f"a checkpoint of DeepSpeed's. Gather its weights first: python {folder}/zero_to_fp32.py "
        f"{folder} NEW --safe_serialization; put config.json and the tokenizer's files into NEW, "
        "and convert that"
    )


def _sharded(root: Path) -> str | None:
    """Near a checkpoint of torch.distributed.checkpoint: in a run of FSDP's, or of torchtitan."""
    if any(root.glob("*.distcp")):
        return f"a sharded checkpoint of torch's, without its {METADATA}. Fetch that too"
    steps = _children(root, is_dcp_checkpoint)
    # The Trainer keeps an optimizer's beside the model's.
    steps = [path for path in steps if not path.name.startswith("optimizer")]
    if not steps:
        return None
    last = max(steps, key=_step)
    like = root if (root / "config.json").is_file() else "DIR_OR_ID"
    return (
        f"sharded checkpoints of torch's (FSDP, torchtitan) lie in folders below it: name one, "
        f"such as {last}, and the model's configuration with --like {like}"
    )


def _inside_step(root: Path) -> str | None:
    """A folder of a Nanotron checkpoint: `model`, `optimizer`, or what lies in them."""
    for parent in list(root.resolve().parents)[:3]:
        if (parent / "model_config.json").is_file():
            return f"a part of the Nanotron checkpoint {parent}: name that"
    return None


def _steps(root: Path) -> str | None:
    """A folder of Nanotron's training steps, without the file that says which is the last."""
    steps = _children(root, lambda path: path.name.isdigit() and _is_nanotron(path))
    if not steps:
        return None
    steps.sort(key=lambda path: int(path.name))
    return (
        f"a folder of {len(steps)} training steps, without latest.txt to say which is the last: "
        f"name one, such as {steps[-1]}"
    )


def _trainer(root: Path) -> str | None:
    """A folder of the Trainer's `checkpoint-N`, or of any other checkpoints."""
    found = _children(root, lambda path: (path / "config.json").is_file() or _is_nanotron(path))
    if not found:
        return None

    found.sort(key=_step)
    shown = ", ".join(path.name for path in found[-_NUM_SHOWN:])
    more = f" and {len(found) - _NUM_SHOWN} more" if len(found) > _NUM_SHOWN else ""
    return f"checkpoints lie in folders below it ({shown}{more}): name one, such as {found[-1]}"


def _step(path: Path) -> int:
    """The number at the end of a folder's name, or -1."""
    number = path.name.rpartition("-")[2]
    # Not isdigit alone: it takes digits that int does not.
    return int(number) if number.isdecimal() else -1


def _is_nanotron(path: Path) -> bool:
    return (path / "model_config.json").is_file() or (path / "model" / "model").is_dir()


def _others(root: Path) -> str | None:
    for pattern, what in _OTHER_FORMATS:
        for path in sorted(root.glob(pattern)):
            return f"the weights are in {path.name}, a {what}"
    if (root / "model_index.json").is_file():
        return "a pipeline of diffusers', not a language model"
    return None
