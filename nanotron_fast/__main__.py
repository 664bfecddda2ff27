"""`python -m nanotron_fast` is the command `nanotron-fast`."""

from nanotron_fast.cli import main

if __name__ == "__main__":
    main()
