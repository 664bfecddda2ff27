"""Running two checkpoints on the same tokens: what every guide asks for.

Each side is run by what it is for, in fp32 on the CPU: a Hugging Face checkpoint by transformers, a
Nanotron one by Nanotron's own rules (`nanotron_forward`), one of this package's own class by its
models, which the caller gives. The first two do not go by the tables of a conversion: a mistake in
those would be on both sides alike, and not show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.source import read
from nanotron_fast.checkpoints.stored import NanotronModel
from nanotron_fast.errors import ConfigError
from nanotron_fast.extras import require
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint
from nanotron_fast.formats.huggingface.quantization import read_quantization
from nanotron_fast.formats.nanotron.classes import class_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitsReport:
    """The outputs of both models on the same token ids, computed in fp32.

    They count as equal when their largest difference is within `tolerance`. `num_same_argmax` of
    the tokens have their largest logit at the same place; `programs` says what ran A and B.
    """

    max_difference: float
    max_magnitude: float
    tolerance: float
    num_tokens: int
    num_same_argmax: int
    programs: tuple[str, str]

    @property
    def equal(self) -> bool:
        return self.max_difference <= self.tolerance


# Of a checkpoint of this package's own class, and the options of a load: its logits by token ids.
OwnForward = Callable[[Path, dict[str, Any]], Callable[[Any], Any]]

_BATCH, _LENGTH = 2, 32
# A window shorter than that is exceeded, so that it shows.
_MAX_WINDOW = 256
# Of the largest logit: rounding in fp32 by one program, by two that add in another order, and of
# weights that one side has in fewer bits.
_SAME, _RELATIVE, _RELATIVE_CAST = 1e-5, 1e-4, 5e-2


@dataclass(frozen=True, slots=True)
class _Side:
    """One checkpoint, ready to run."""

    run: Callable[[Tensor], Tensor]
    name: str
    vocab_size: int
    max_positions: int
    window: int | None


def compare_logits(
    a: Path,
    b: Path,
    options: Options,
    *,
    has_casts: bool,
    own_forward: OwnForward | None = None,
) -> LogitsReport:
    """Runs both models on the same random tokens, and compares their outputs.

    What the extra "logits" has must be there. Raises ConfigError where transformers cannot run a
    side; CheckpointError, OSError.
    """
    import torch

    sides = [_side(root, options, own_forward) for root in (a, b)]
    vocab_size = min(side.vocab_size for side in sides)
    windows = [side.window for side in sides if side.window and side.window <= _MAX_WINDOW]
    length = min(
        max(_LENGTH, *(window + _LENGTH // 2 for window in windows), 0),
        *(side.max_positions for side in sides),
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (_BATCH, length), generator=generator)
    first, second = (side.run(tokens)[..., :vocab_size] for side in sides)
    largest = float(first.abs().max())
    is_same = sides[0].name == sides[1].name
    relative = _RELATIVE_CAST if has_casts else _SAME if is_same else _RELATIVE
    return LogitsReport(
        max_difference=float((first - second).abs().max()),
        max_magnitude=largest,
        tolerance=relative * largest,
        num_tokens=tokens.numel(),
        num_same_argmax=int((first.argmax(-1) == second.argmax(-1)).sum()),
        programs=(sides[0].name, sides[1].name),
    )


def _side(root: Path, options: Options, own_forward: OwnForward | None) -> _Side:
    """Raises CheckpointError, ConfigError, OSError."""
    checkpoint = read(root)
    if isinstance(checkpoint, HfCheckpoint):
        if read_quantization(checkpoint.config) is not None:
            what = f"--logits of {root}, whose weights are quantised,"
            require("logits", what, ["accelerate"])
        return _hf_side(root)
    if not class_of(checkpoint.model_config).is_stock:
        return _own_side(root, NanotronModel(checkpoint, options), options, own_forward)
    from nanotron_fast.checkpoints.nanotron_forward import NanotronForward

    forward = NanotronForward(checkpoint, options)
    spec = forward.spec
    return _Side(
        forward,
        forward.name,
        forward.vocab_size,
        spec.max_position_embeddings,
        spec.sliding_window,
    )


def _own_side(
    root: Path, model: NanotronModel, options: Options, own_forward: OwnForward | None
) -> _Side:
    if own_forward is None:
        raise ConfigError(
            f"--logits: {root} is a {model.model_class}, which nanotron_fast.verify runs"
        )
    choices: dict[str, Any] = {"ignore_tensors": options.ignore_tensors, "family": options.family}
    return _Side(
        own_forward(root, choices),
        f"this package's {model.model_class} in nanotron_fast.models",
        model.spec.vocab_size,
        model.spec.max_position_embeddings,
        max(filter(None, model.spec.windows), default=None),
    )


def _hf_side(root: Path) -> _Side:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = _hf_config(root)
    # Version 4's default leaves out caps of scores.
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    options = {"attn_implementation": "eager"} if is_capped else {}

    def run(tokens: Tensor) -> Tensor:
        # By this side alone, and no longer than it is needed.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, **options)
            # Modules that are made in a dtype of their own, as Apertus' activation, keep it.
            model = model.float().eval()
            with torch.no_grad():
                logits: Tensor = model(input_ids=tokens).logits
        except Exception as error:  # of a hundred model classes: their errors have no common base
            raise _refused(root, error) from error
        return logits

    return _Side(
        run,
        "transformers",
        int(config.vocab_size),
        int(config.max_position_embeddings),
        getattr(config, "sliding_window", None),
    )


def _hf_config(root: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(root)
    except Exception as error:  # as above
        raise _refused(root, error) from error


def _refused(root: Path, error: Exception) -> ConfigError:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return ConfigError(
        f"--logits: transformers cannot run {root}: {type(error).__name__}: {first_line}"
    )
