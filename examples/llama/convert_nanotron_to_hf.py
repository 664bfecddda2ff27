"""Stands in for the script of this name in Nanotron's examples/llama: same flags."""

from nanotron_fast.cli.scripts.convert_nanotron_to_hf import main

if __name__ == "__main__":
    main()
