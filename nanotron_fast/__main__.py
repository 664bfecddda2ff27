"""The command `nanotron-fast`, and `python -m nanotron_fast`.

Its exit codes are in `cli/entry.py`.
"""

from __future__ import annotations

import sys

from nanotron_fast.cli.entry import run_command


def _command() -> None:
    from nanotron_fast.cli import needs

    needs.check(sys.argv[1:])
    from nanotron_fast.cli.commands import app

    app(prog_name="nanotron-fast")


def main() -> None:
    """Runs the command."""
    run_command(_command)


if __name__ == "__main__":
    main()
