"""How every command starts and ends: signals, streams, exit codes.

Imported before anything heavy: a signal that comes while the rest is imported is answered as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from nanotron_fast import interruption
from nanotron_fast.cli import streams
from nanotron_fast.errors import MissingPackageError, notes_of, one_line

EXIT_DIFFERENT = 1
EXIT_BAD_INPUT = 2
EXIT_FAULT = 70
# Each with what it says, for help and documents.
EXIT_CODES = (
    ("0", "done"),
    ("1", "`verify` found a difference, `doctor` that nothing can work here"),
    ("2", "bad input or usage"),
    ("70", "a fault of this package"),
    ("130, 143, 129", "ended by SIGINT, SIGTERM, SIGHUP"),
)


def run_command(command: Callable[[], None]) -> NoReturn:
    """Runs a command, and ends the process with the exit code that its work deserves."""
    streams.protect()
    code = 0
    try:
        interruption.install()
        command()
    except SystemExit as ended:
        code = _code_of(ended)
    except interruption.Interrupted as interrupted:
        interruption.ignore()
        print(
            f"{interrupted}: {interrupted.remains or 'nothing was written'}",
            file=sys.stderr,
        )
        streams.finish()
        # At once: threads of libraries may be waiting for what never comes.
        os._exit(interrupted.exit_code)
    except MissingPackageError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except MemoryError as error:
        print("error: there is not enough memory", *notes_of(error), sep="\n", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except Exception as error:
        import traceback

        # Not 1, Python's own: of `verify` that says that something differs.
        traceback.print_exc()
        if sys.version_info < (3, 11):  # later ones print them with the traceback
            print(*notes_of(error), sep="\n", file=sys.stderr)
        code = EXIT_FAULT
    interruption.ignore()
    streams.finish()
    if code and _has_joined():
        # Not in order: threads of the connection may wait for what never comes, or abort.
        os._exit(code)
    sys.exit(code)


def _has_joined() -> bool:
    """Whether the command has connected this process to others.

    A script that is run may do so itself, and ends as its libraries want.
    """
    processes = sys.modules.get("nanotron_fast.checkpoints.processes")
    return processes is not None and bool(processes.is_joined())


def _code_of(ended: SystemExit) -> int:
    if isinstance(ended.code, int):
        return ended.code
    if ended.code is None:
        return 0
    print(ended.code, file=sys.stderr)
    return 1
