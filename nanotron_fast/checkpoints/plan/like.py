"""`--like`: the model that a Nanotron checkpoint was made from, named by the user."""

from __future__ import annotations

from pathlib import Path

from nanotron_fast.errors import CheckpointError, NanotronFastError
from nanotron_fast.families import family_of_config
from nanotron_fast.families.hf_config import read_config
from nanotron_fast.families.refusals import check_config
from nanotron_fast.formats.huggingface import checkpoint as hf
from nanotron_fast.formats.huggingface.files import EXPLICIT
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron import side_file
from nanotron_fast.formats.nanotron.side_file import SideFile, read_side_file
from nanotron_fast.model.spec import STRUCTURE, ModelSpec
from nanotron_fast.version import __version__

# What shows in the shapes of tensors, or in which of them there are. The vocabulary may be padded,
# and of experts every number is said.
_SHAPES = tuple(name for name in STRUCTURE if name not in ("vocab_size", "moe", "moe_layers"))
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_like(root: Path, family: str | None) -> SideFile:
    """What the side file would say. `root` is a Hugging Face folder, or one with a side file.

    Raises CheckpointError, ConfigError, UnsupportedModelError, OSError.
    """
    side = read_side_file(root)
    if side is not None:
        return side
    if not (root / hf.CONFIG).is_file():
        raise CheckpointError(f"--like {root}: it has no {hf.CONFIG} and no {side_file.NAME}")
    try:
        # Quantised or not, it is the configuration alone that is taken.
        config, _ = check_config(read_json_object(root / hf.CONFIG), ())
        found = family_of_config(config, family)
        spec = read_config(found, config)
    except NanotronFastError as error:
        raise type(error)(f"--like {root}: {error}") from None
    config.pop(EXPLICIT, None)
    generation = root / hf.GENERATION_CONFIG
    return SideFile(
        tool_version=__version__,
        family=found.name,
        target="nanotron",
        dtype="",
        vocab_size=spec.vocab_size,
        config=config,
        generation_config=read_json_object(generation) if generation.is_file() else None,
    )


def check_shapes(root: Path, like: ModelSpec, stored: ModelSpec) -> None:
    """Refuses a model of other shapes than the checkpoint's. Raises CheckpointError."""
    pairs = {name: (getattr(like, name), getattr(stored, name)) for name in _SHAPES}
    pairs["layers with experts"] = like.moe_layers, stored.moe_layers
    for name, get in (
        ("experts", lambda moe: moe.num_experts),
        ("moe_intermediate_size", lambda moe: moe.intermediate_size),
        ("shared_expert_intermediate_size", lambda moe: moe.shared_intermediate_size),
    ):
        pairs[name] = like.moe and get(like.moe), stored.moe and get(stored.moe)
    differing = [f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise CheckpointError(
            f"--like {root}: it is of another shape than the checkpoint (its value first): "
            f"{'; '.join(differing)}"
        )
