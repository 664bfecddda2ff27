"""Running two checkpoints in transformers on the same tokens: what every guide asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanotron_fast import reference
from nanotron_fast.errors import ConfigError
from nanotron_fast.layouts import hf
from nanotron_fast.layouts.hf import HfCheckpoint
from nanotron_fast.planning.options import Options
from nanotron_fast.planning.to_hf import plan_to_hf
from nanotron_fast.source import read
from nanotron_fast.verification import LogitsReport

_BATCH, _LENGTH = 2, 32
# Of the largest logit: rounding in fp32, or of weights that one side has in fewer bits.
_RELATIVE, _RELATIVE_CAST = 1e-5, 5e-2


def compare_logits(
    a: Path,
    b: Path,
    *,
    family: str | None,
    has_casts: bool,
    rope_interleaved: bool | None = None,
) -> LogitsReport:
    """Loads both models, one after the other, and compares their outputs in fp32.

    Raises ConfigError where torch or transformers is not there.
    """
    try:
        import torch
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError(f"--logits: it needs torch and transformers: {error}") from None

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    outputs = []
    tokens: Any = None
    for root in (a, b):
        model = _load(root, Options(family=family, rope_interleaved=rope_interleaved))
        if tokens is None:
            generator = torch.Generator().manual_seed(0)
            length = min(_LENGTH, int(model.config.max_position_embeddings))
            tokens = torch.randint(
                int(model.config.vocab_size), (_BATCH, length), generator=generator
            )
        with torch.no_grad():
            outputs.append(model(input_ids=tokens).logits)
        del model
    largest = float(outputs[0].abs().max())
    return LogitsReport(
        max_difference=float((outputs[0] - outputs[1]).abs().max()),
        max_magnitude=largest,
        tolerance=(_RELATIVE_CAST if has_casts else _RELATIVE) * largest,
        num_tokens=int(tokens.numel()),
    )


def _load(root: Path, options: Options) -> Any:
    """A checkpoint of either format as a transformers model in fp32, in evaluation mode."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    checkpoint = read(root)
    if isinstance(checkpoint, HfCheckpoint):
        return AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    plan = plan_to_hf(checkpoint, options)
    document = json.loads(plan.documents[hf.CONFIG]())
    config = AutoConfig.for_model(document.pop("model_type"), **document)
    # from_pretrained, and not load_state_dict: it knows how this version keeps experts.
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind.from_pretrained(
        None, config=config, state_dict=_weights(plan.transfer), dtype=torch.float32
    ).eval()


def _weights(transfer: Any) -> dict[str, Any]:
    """Every tensor of a plan for Hugging Face files, made in memory."""
    from safetensors.torch import load

    weights: dict[str, Any] = {}
    for data in reference.execute_in_memory(transfer).values():
        weights.update(load(data.tobytes()))
    return weights
