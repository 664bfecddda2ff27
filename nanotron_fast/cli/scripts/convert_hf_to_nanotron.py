"""Hugging Face to Nanotron, called like Nanotron's own examples/llama/convert_hf_to_nanotron.py.

    torchrun --nproc_per_node=1 convert_hf_to_nanotron.py --checkpoint_path=HF --save_path=DIR

No GPU, no Nanotron and, for one process, no torch is needed. Each of several processes writes its
share of the files.
"""

from __future__ import annotations

from argparse import ArgumentParser

from nanotron_fast.cli.scripts.common import add_flags, run


def main() -> None:
    """Runs the command."""
    parser = ArgumentParser(description="Convert HF weights to nanotron format")
    parser.add_argument("--checkpoint_path", default="llama-7b", help="A directory, or a Hub id")
    parser.add_argument("--save_path", default="llama-7b-hf", help="The directory to write")
    add_flags(
        parser,
        tp="--tp",
        pp="--pp",
        tokenizer="--tokenizer_name",
        ignore_tensors="--ignore_tensors",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace a non-empty save_path")
    run(parser, to="nanotron")


if __name__ == "__main__":
    main()
