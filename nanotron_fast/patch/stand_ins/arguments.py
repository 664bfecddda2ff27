"""What a stand-in says about an argument that it does not support."""

from __future__ import annotations


def refuse(function: str, **asked: bool) -> None:
    """Raises NotImplementedError with the names of the arguments that are asked for.

    `refuse("flash_attn_func", dropout_p=dropout_p > 0)`
    """
    names = ", ".join(name for name, is_asked in asked.items() if is_asked)
    if names:
        raise NotImplementedError(
            f"{function}: nanotron_fast's stand-in does not support {names}; "
            f"the real package, where it is installed, is used instead of it"
        )
