"""Hugging Face to Nanotron, called like Nanotron's own examples/llama/convert_hf_to_nanotron.py.

    torchrun --nproc_per_node=1 convert_hf_to_nanotron.py --checkpoint_path=HF --save_path=DIR

No GPU, no Nanotron and, for one process, no torch is needed. Each of several processes writes its
share of the files.
"""

from __future__ import annotations

from argparse import ArgumentParser

from nanotron_fast.cli.scripts.common import add_ignore_tensors, run


def main() -> None:
    """Runs the command."""
    parser = ArgumentParser(description="Convert HF weights to nanotron format")
    parser.add_argument("--checkpoint_path", default="llama-7b", help="A directory, or a Hub id")
    parser.add_argument("--save_path", default="llama-7b-hf", help="The directory to write")
    parser.add_argument("--tp", type=int, default=1, help="Tensor-parallel ranks to write for")
    parser.add_argument("--pp", type=int, default=1, help="Pipeline stages to write for")
    parser.add_argument(
        "--tokenizer_name", help="A directory or Hub id with a tokenizer to put beside the model"
    )
    add_ignore_tensors(parser)
    parser.add_argument("--overwrite", action="store_true", help="Replace a non-empty save_path")
    args = parser.parse_args()
    run(
        args.checkpoint_path,
        args.save_path,
        direction="nanotron",
        overwrite=args.overwrite,
        tp=args.tp,
        pp=args.pp,
        tokenizer=args.tokenizer_name,
        ignore_tensors=args.ignore_tensors,
    )


if __name__ == "__main__":
    main()
