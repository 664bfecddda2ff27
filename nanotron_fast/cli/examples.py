"""What the help of each command ends with: command lines that do what is most often wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Example(NamedTuple):
    """A command line, and what it is for."""

    purpose: str
    command: str


# "" is all commands.
EXAMPLES: Mapping[str, tuple[Example, ...]] = {
    "": (
        Example(
            "A Hugging Face model for Nanotron, over four GPUs:",
            "nanotron-fast convert llama-hf llama-nanotron --tp 4",
        ),
        Example("And back:", "nanotron-fast convert llama-nanotron llama-hf-again"),
        Example("Is it the same?", "nanotron-fast verify llama-hf llama-nanotron"),
        Example("What would be slow or missing here?", "nanotron-fast doctor"),
    ),
    "convert": (
        Example(
            "What would be done, from headers alone:",
            "nanotron-fast convert Qwen/Qwen2.5-7B qwen-nanotron --tp 4 --dry-run",
        ),
        Example(
            "A Hugging Face model for Nanotron:",
            "nanotron-fast convert llama-hf llama-nanotron --tp 2 --pp 2",
        ),
        Example(
            "Back after a training:",
            "nanotron-fast convert run/checkpoints/1000 trained-hf --like llama-hf",
        ),
        Example(
            "Another topology:",
            "nanotron-fast convert tp8 tp2-pp2 --to nanotron --tp 2 --pp 2",
        ),
        Example(
            "Shared by many processes:",
            "torchrun --nproc-per-node=8 -m nanotron_fast convert llama-hf llama-nanotron --tp 8",
        ),
    ),
    "verify": (
        Example("Every tensor of two:", "nanotron-fast verify llama-hf llama-nanotron"),
        Example("And the logits of both:", "nanotron-fast verify llama-hf llama-nanotron --logits"),
        Example("One against its own manifest:", "nanotron-fast verify llama-nanotron"),
    ),
    "inspect": (
        Example("A directory in any format:", "nanotron-fast inspect llama-nanotron"),
        Example("A model on the Hub:", "nanotron-fast inspect hf://Qwen/Qwen2.5-7B --json"),
    ),
    "reshard": (
        Example(
            "A run that goes on with other GPUs:",
            "nanotron-fast reshard run/1000 run-tp2/1000 --tp 2 --pp 4 --dp 8",
        ),
        Example(
            "The optimizer's states shared out over the ranks:",
            "nanotron-fast reshard run/1000 run-zero/1000 --zero-stage 1",
        ),
    ),
    "train": (
        Example(
            "What it takes, and whether it fits:",
            "nanotron-fast train train.yaml --dry-run --memory 80GB",
        ),
        Example(
            "On eight GPUs, or on CPUs over gloo:",
            "torchrun --nproc-per-node=8 -m nanotron_fast train train.yaml",
        ),
        Example(
            "With something changed:",
            "nanotron-fast train train.yaml --tokens.train_steps=100",
        ),
    ),
    "tokenize": (
        Example(
            "A folder of .jsonl files, once for all runs:",
            "nanotron-fast tokenize text tokens --tokenizer llama-hf",
        ),
        Example(
            "A dataset of the Hub:",
            "nanotron-fast tokenize roneneldan/TinyStories tokens --tokenizer llama-hf "
            "--split validation",
        ),
    ),
    "generate": (
        Example(
            "The likeliest continuation:",
            'nanotron-fast generate llama-nanotron --prompt "Once upon a time"',
        ),
        Example(
            "A sampled one:",
            'nanotron-fast generate llama-hf --prompt "Once upon a time" --temperature 0.8 '
            "--top-p 0.9 --seed 7",
        ),
        Example(
            "Over two GPUs:",
            "torchrun --nproc-per-node=2 -m nanotron_fast generate llama-hf "
            '--prompt "Once upon a time"',
        ),
    ),
    "plot": (
        Example("One run:", "nanotron-fast plot run"),
        Example("Several beside each other:", "nanotron-fast plot run-1 run-2 --output both"),
    ),
    "run": (
        Example(
            "Nanotron's own training, with our kernels:",
            "torchrun --nproc-per-node=8 -m nanotron_fast run run_train.py "
            "--config-file train.yaml",
        ),
        Example("On a CPU:", "nanotron-fast run --cpu run_train.py --config-file train.yaml"),
    ),
    "env": (Example("For a report of a fault:", "nanotron-fast env"),),
    "doctor": (
        Example("Here:", "nanotron-fast doctor"),
        Example("For checkpoints on another disk:", "nanotron-fast doctor /scratch"),
    ),
}
