"""A stdout and a stderr that cannot fail the work: a full device, a reader that is gone.

What cannot be written is lost; the exit code speaks of the work alone. Nothing heavy is imported
here: the command does this before all else.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any


class _UnfailingFile(io.FileIO):
    """Writes until it fails once, and throws the rest away."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes a block of bytes, or part of it."""
        view = memoryview(data)
        while self.failure is None:
            try:
                # The stubs leave out None: a pipe that does not block has no room just now.
                written: int | None = super().write(view)
            except OSError as error:
                self.failure = error
                break
            if written is not None:
                return written
            select.select([], [self], [])
        return view.nbytes


def protect() -> None:
    """Replaces both streams, and opens descriptors that are closed onto the null device.

    Without that, the first file that is opened would get the descriptor of the closed stderr, and
    whatever is said there would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        is_text = isinstance(before, io.TextIOWrapper)
        if is_text and isinstance(before.buffer, io.BufferedWriter):
            if isinstance(before.buffer.raw, _UnfailingFile):
                continue
            before.flush()
        file = _UnfailingFile(descriptor, "wb", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(file),
            encoding=before.encoding if is_text else "utf-8",
            # Paths are bytes, and may not be text in the terminal's encoding.
            errors="backslashreplace",
            line_buffering=name == "stderr" or file.isatty(),
        )
        setattr(sys, name, stream)


def finish() -> None:
    """Writes what is still held back, and says on stderr what stdout has lost.

    A reader that is gone has had what it wanted.
    """
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    file = getattr(buffer, "raw", None)
    failure = file.failure if isinstance(file, _UnfailingFile) else None
    if failure is not None and failure.errno != errno.EPIPE:
        print(f"warning: stdout cannot be written to: {failure.strerror}", file=sys.stderr)
    sys.stderr.flush()
