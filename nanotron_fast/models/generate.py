"""Text that a model continues: one prompt, a key-value cache, greedy or sampled.

Under tensor parallelism every rank gathers the logits and draws with the same seed, so that all
of them go on with the same token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanotron_fast.checkpoints.remote.packages import require_store
from nanotron_fast.checkpoints.source import read, resolve, resolve_companions
from nanotron_fast.errors import CheckpointError, ConfigError
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron.side_file import read_side_file
from nanotron_fast.kernels.runtime.collectives import Group, all_gather
from nanotron_fast.models.architecture import Architecture
from nanotron_fast.models.building import build
from nanotron_fast.models.cache import Cache
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.models.tokenizer import tokenizer_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TORCH_NAMES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Generation:
    """The new tokens alone, and their text without special tokens."""

    text: str
    token_ids: list[int]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"text": self.text, "token_ids": self.token_ids}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen.

    Args:
        temperature: the logits are divided by it; None or 0 takes the likeliest token.
        top_p: of the likeliest tokens, as few as have this probability together; 1: all.
        seed: of the numbers that are drawn.

    Raises ConfigError.
    """

    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature >= 0:
            raise ConfigError(f"--temperature {self.temperature}: it should be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: it should be above 0, and at most 1")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token from logits (vocabulary,)."""
        if not self.temperature:
            return int(logits.argmax())
        probabilities = (logits.float().cpu() / self.temperature).softmax(-1)
        ordered, ids = probabilities.sort(descending=True, stable=True)
        # Those before which less than top_p lies: the first always.
        kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
        return int(ids[kept.multinomial(1, generator=generator)])


@torch.no_grad()
def generate_ids(
    decoder: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stops: Collection[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """The tokens that follow a prompt, the one in `stops` that ends them among them.

    Args:
        decoder: of a whole model, tp ranks of it, in mode "all_reduce".
        prompt: token ids, at least one.
        max_new_tokens: at the most.
        on_token: told how many there are, after each.

    Raises ConfigError: the decoder or the numbers make no sense.
    """
    if not (decoder.is_first and decoder.is_last) or decoder.setting.is_scattered:
        raise ConfigError("generating takes a decoder of all layers, in mode all_reduce")
    _check(decoder.architecture, prompt, max_new_tokens)
    vocab_size = decoder.architecture.vocab_size
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    device = decoder.head_weight.device
    cache = Cache(len(prompt) + max_new_tokens)
    new: list[int] = []
    tokens = list(prompt)
    while len(new) < max_new_tokens:
        ids = torch.tensor([tokens], device=device)
        logits = decoder(ids, cache=cache, last_alone=True)[0, -1]
        whole = all_gather(logits, decoder.setting.ranks).flatten()[:vocab_size]
        token = sampling.choose(whole, generator)
        new.append(token)
        if on_token is not None:
            on_token(len(new))
        if token in stops:
            break
        tokens = [token]
    return new


def _check(model: Architecture, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Whether a model can go on with a prompt for so long. Raises ConfigError."""
    if not prompt:
        raise ConfigError("the prompt has no tokens: give some text")
    if max_new_tokens < 0:
        raise ConfigError(f"--max-new-tokens {max_new_tokens}: it should be 0 or more")
    largest = max(prompt)
    if largest >= model.vocab_size:
        raise ConfigError(
            f"the prompt has token {largest}, and the model {model.vocab_size} tokens: the "
            "tokenizer is another model's"
        )
    positions, taken = model.spec.max_positions, len(prompt)
    if positions is None or taken + max_new_tokens <= positions:
        return
    keys = model.spec.keys_of_max_positions
    if taken > positions:
        raise ConfigError(
            f"the prompt has {taken} tokens, and the model {positions} positions ({keys}): shorten "
            "it"
        )
    raise ConfigError(
        f"--max-new-tokens {max_new_tokens}: the prompt takes {taken} of the model's {positions} "
        f"positions ({keys}), which leaves {positions - taken}"
    )


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    tokenizer: str | Path | None = None,
    group: Group = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Continues a text with a checkpoint's model, in either format and at any topology.

    Args:
        path: a folder, or the id of a model on the Hub.
        prompt: text, as the tokenizer takes it: with the special tokens that it adds, and without
            a chat template.
        tokenizer: a folder, an id or a URL; by default the checkpoint's own.
        group: of tensor parallelism: each rank reads its shards alone.
        device: to compute on.
        dtype: to compute in; by default fp32 on a CPU, and on a GPU what most of the weights have.
        on_token: told how many there are, after each new one.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError, TopologyError, OSError;
        MissingPackageError: what reads tokenizers, or from a store, is not installed.
    """
    require_store(tokenizer)
    root = resolve(path)
    sampling = sampling or Sampling()
    words = _tokenizer(root, tokenizer)
    ids = words(prompt)["input_ids"]
    # Before the weights are read, which may take long.
    _check(Architecture.of_checkpoint(root), ids, max_new_tokens)
    if dtype is None:
        is_cpu = torch.device(device).type == "cpu"
        dtype = torch.float32 if is_cpu else _stored_dtype(root)
    decoder = build(root, group=group, dtype=dtype, device=device)
    new = generate_ids(
        decoder,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stops=_stops(root, decoder.architecture.spec.eos_token_id),
        on_token=on_token,
    )
    return Generation(str(words.decode(new, skip_special_tokens=True)), new)


def _tokenizer(root: Path, given: str | Path | None) -> PreTrainedTokenizerBase:
    """Raises CheckpointError, MissingPackageError."""
    if given is not None:
        return tokenizer_in(resolve_companions(given))
    try:
        return tokenizer_in(root)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --tokenizer takes one from elsewhere") from error


def _stops(root: Path, of_spec: Any) -> set[int]:
    """The ids that end a text: generation_config.json says it before the model's configuration."""
    found: Any = None
    path = root / "generation_config.json"
    side = read_side_file(root)
    if path.is_file():
        found = read_json_object(path).get("eos_token_id")
    elif side is not None:
        found = _eos(side.generation_config) or _eos(side.config)
    found = of_spec if found is None else found
    return set(found) if isinstance(found, list) else set() if found is None else {int(found)}


def _eos(config: Mapping[str, Any] | None) -> Any:
    return None if config is None else config.get("eos_token_id")


def _stored_dtype(root: Path) -> torch.dtype:
    """That of most elements. What the engine cannot load is refused there."""
    checkpoint = read(root)
    if isinstance(checkpoint, HfCheckpoint):
        infos = [tensor.info for tensor in checkpoint.tensors.values()]
    else:
        infos = [shard.info for shards in checkpoint.params.values() for shard in shards]
    counts: Counter[str] = Counter()
    for info in infos:
        counts[info.dtype] += info.num_elements
    name, _ = counts.most_common(1)[0]
    return _TORCH_NAMES.get(name, torch.float32)
