"""Git LFS pointers: the few lines of text that stand where a file was not downloaded."""

from __future__ import annotations

_START = b"version https://git-lfs.github.com/spec/"
HINT = 'a git-lfs pointer, not the file itself; run "git lfs pull" in the folder that was cloned'


def is_pointer(data: bytes) -> bool:
    """Whether a file that begins with these bytes is a pointer."""
    return data.startswith(_START)
