"""The values that an option takes where they can be told: for its check, and for a shell.

Imported at every start: what the values come from is imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence


def formats() -> Sequence[str]:
    """Of --to."""
    return ("nanotron", "hf", "dcp")


def dtypes() -> Sequence[str]:
    """Of --dtype."""
    return ("keep", "bf16", "fp16", "fp32")


def classes() -> Sequence[str]:
    """Of --model-class."""
    from nanotron_fast.formats.nanotron import classes as known

    return ("auto", *(each.option for each in known.classes()))


def families() -> Sequence[str]:
    """Of --family: those that are registered."""
    from nanotron_fast.families import family_names

    return family_names()


def targets() -> Sequence[str]:
    """Of --target."""
    from nanotron_fast.families.refusals import TARGETS

    return TARGETS


def versions() -> Sequence[str]:
    """Of --checkpoint-version."""
    from nanotron_fast.families.refusals import VERSIONS

    return VERSIONS


def namings() -> Sequence[str]:
    """Of --names."""
    from nanotron_fast.families.torchtitan import NAMINGS

    return ("hf", *NAMINGS)
