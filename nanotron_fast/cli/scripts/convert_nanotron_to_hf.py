"""Nanotron to Hugging Face, called like Nanotron's own examples/llama/convert_nanotron_to_hf.py.

    torchrun --nproc_per_node=1 convert_nanotron_to_hf.py --checkpoint_path=DIR --save_path=HF

The class of the configuration is read from model_config.json, so --config_cls is accepted and not
needed. Text is not generated at the end: `nanotron-fast verify --logits` compares the models.
"""

from __future__ import annotations

from argparse import ArgumentParser

from nanotron_fast.cli.scripts.common import add_flags, run


def main() -> None:
    """Runs the command."""
    parser = ArgumentParser(description="Convert Nanotron weights to HF format")
    parser.add_argument("--checkpoint_path", default="llama-7b", help="A Nanotron checkpoint")
    parser.add_argument("--save_path", default="llama-7b-hf", help="The directory to write")
    add_flags(
        parser,
        tokenizer="--tokenizer_name",
        like="--like",
        rope_interleaved="--rope-interleaved",
        ignore_tensors="--ignore_tensors",
    )
    parser.add_argument(
        "--config_cls",
        choices=("LlamaConfig", "Qwen2Config"),
        help="Accepted for compatibility; model_config.json says which it is",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace a non-empty save_path")
    run(parser, to="hf")


if __name__ == "__main__":
    main()
