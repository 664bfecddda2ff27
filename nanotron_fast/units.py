"""Numbers of bytes and of things, as people write and read them."""

from __future__ import annotations

from collections.abc import Sequence

from nanotron_fast.errors import ConfigError

# A plain B last: every other unit ends in it.
_UNITS = {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "B": 1,
}


def size(num_bytes: float) -> str:
    """Decimal, with three digits or so: "2.20 GB"."""
    for unit in ("B", "kB", "MB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} GB"


def count(number: int, noun: str) -> str:
    """Of what a noun in the singular names: "1 file", "1,204 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Names as a message has them where there may be many: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def parse_size(text: str | int, option: str) -> int:
    """Bytes, from a number or a size such as "5GB" or "80GiB".

    Raises ConfigError, which names the option, where it is no size or less than one byte.
    """
    if isinstance(text, int):
        num_bytes = text
    else:
        number, unit = text.strip().upper(), 1
        for suffix, factor in _UNITS.items():
            if number.endswith(suffix):
                number, unit = number[: -len(suffix)].strip(), factor
                break
        try:
            num_bytes = int(float(number) * unit)
        except (ValueError, OverflowError):
            raise ConfigError(f"{option} {text}: write it like 5GB or 500MB") from None
    if num_bytes < 1:
        raise ConfigError(f"{option} {text}: it should be at least one byte")
    return num_bytes
