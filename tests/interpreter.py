"""Triton's interpreter, without the work that it does again at every call.

At a launch it puts its own functions in place of those of Triton's language, which takes a walk
through hundreds of names. It does so again whenever the kernel calls a function, `tl.sum` and
`tl.cdiv` among them, though all is in place by then: most of a kernel's time goes there.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar


def patch_once_a_launch() -> None:
    """Keeps the interpreter, where it is loaded, from putting in place what is in place."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    # A version that goes about it in another way is left as it is.
    scope_class = getattr(interpreter, "_LangPatchScope", None)
    if scope_class is None or hasattr(scope_class, "in_place"):
        return
    language = interpreter.tl
    patch = interpreter._patch_lang

    class Scope(scope_class):
        """What a launch puts in place, and takes back when it ends. Calls take nothing back."""

        in_place: ClassVar[set[int]] = set()

        def restore(self) -> None:
            self.in_place.clear()
            super().restore()

    def patch_lang(function: Any) -> Any:
        found = function.__globals__.values()
        modules = {id(each) for each in found if each is language or each is language.core}
        if modules <= Scope.in_place:
            return Scope()
        scope = patch(function)
        Scope.in_place |= modules
        return scope

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = patch_lang
