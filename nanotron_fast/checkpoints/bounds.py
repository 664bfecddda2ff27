"""How large a model the files can hold: asked before anything is made for each layer and expert."""

from __future__ import annotations

from nanotron_fast.errors import CheckpointError, PartialCheckpointError
from nanotron_fast.formats.huggingface import checkpoint as hf
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint
from nanotron_fast.formats.nanotron import checkpoint as nanotron
from nanotron_fast.formats.nanotron.checkpoint import NanotronCheckpoint
from nanotron_fast.formats.safetensors import TensorInfo
from nanotron_fast.model.spec import Experts, ModelSpec


def check_counts(spec: ModelSpec, checkpoint: HfCheckpoint | NanotronCheckpoint) -> None:
    """Refuses a configuration with more layers or experts than the headers have tensors for.

    Which tensors they are is found later; a configuration alone could ask for any number of them.
    Raises CheckpointError.
    """
    if isinstance(checkpoint, HfCheckpoint):
        name, infos = hf.CONFIG, [stored.info for stored in checkpoint.tensors.values()]
    else:
        name = nanotron.MODEL_CONFIG
        infos = [shards[0].info for shards in checkpoint.params.values()]
    if spec.num_layers > len(infos):
        if isinstance(checkpoint, NanotronCheckpoint) and checkpoint.there is not None:
            part = nanotron.says_part(checkpoint.there, checkpoint.tp, checkpoint.pp)
            raise PartialCheckpointError(
                f"{checkpoint.root}: {part}: files of {spec.num_layers:,} layers are wanted"
            )
        raise CheckpointError(
            f"{checkpoint.root}: {name} calls for {spec.num_layers:,} layers, and the files hold "
            f"{len(infos):,} tensors"
        )
    if spec.moe is None:
        return
    counts = [each.mlp.num_experts for each in spec.layers if isinstance(each.mlp, Experts)]
    num_experts = sum(counts)
    room = sum(map(_most_experts, infos))
    if num_experts > room:
        raise CheckpointError(
            f"{checkpoint.root}: {name} calls for {max(counts):,} experts in "
            f"{len(counts):,} layers, and the files hold tensors of {room:,} at most"
        )


def _most_experts(info: TensorInfo) -> int:
    """One, or, of a stack that is not empty, all that are stacked in it."""
    is_stack = len(info.shape) == 3 and info.num_elements > 0
    return info.shape[0] if is_stack else 1
