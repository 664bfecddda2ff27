"""Runs a script of Nanotron's users with the drop-in on, without a change to it."""

from __future__ import annotations

import os
import runpy
import socket
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from nanotron_fast.errors import ConfigError


def _alone() -> dict[str, str]:
    """The variables that torchrun sets for a process that is alone; Nanotron reads them."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _cpu_mode() -> AbstractContextManager[None]:
    # Imported for it alone: it takes all of torch.compile.
    from nanotron_fast.patch.cpu import cpu_mode

    return cpu_mode()


def run(script: str, arguments: Sequence[str], *, on_cpu: bool, **enabling: Any) -> None:
    """Runs a script as `python script arguments` would, after `enable(**enabling)`.

    Args:
        script: the path of a Python file.
        arguments: what follows it on the command line.
        on_cpu: within the CPU mode: over gloo, without a GPU.
        enabling: arguments of `nanotron_fast.enable`.

    Raises:
        ConfigError: there is no such script, Nanotron cannot be imported, or packages that it needs
            are missing or of a version that it cannot use: all of them in one message.
        Exception: whatever the script raises.
    """
    if not Path(script).is_file():
        raise ConfigError(f"{script}: there is no such script")
    from nanotron_fast.patch.nanotron.requirements import check_requirements

    check_requirements()
    from nanotron_fast.patch.nanotron.registry import enable

    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        os.environ.update(_alone())
    with _cpu_mode() if on_cpu else nullcontext():
        try:
            enable(**enabling)
        except ImportError as error:
            raise ConfigError(str(error)) from error
        arguments_before, path_before = sys.argv, sys.path
        sys.argv = [script, *arguments]
        # Modules beside the script come first, as if it had been called itself.
        sys.path = [str(Path(script).resolve().parent), *sys.path]
        try:
            runpy.run_path(script, run_name="__main__")
        finally:
            sys.argv, sys.path = arguments_before, path_before
