"""The command `nanotron-fast`, and `python -m nanotron_fast`.

Exit codes: 0 done; 1 verification found a difference; 2 bad input or usage; 70 a fault of this
package; 130, 143 and 129 ended by SIGINT, SIGTERM and SIGHUP.
"""

from __future__ import annotations

from nanotron_fast.cli.entry import run_command


def _command() -> None:
    from nanotron_fast.cli.commands import app

    app(prog_name="nanotron-fast")


def main() -> None:
    """Runs the command."""
    run_command(_command)


if __name__ == "__main__":
    main()
