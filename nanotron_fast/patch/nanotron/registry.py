"""Turns the drop-in on and off: puts replacements in place of what the table names, and back.

A method is replaced in its class, so that every instance has it, those that exist included. A
function is replaced at home and in every module that has bound it by `from ... import`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from nanotron_fast.errors import ConfigError
from nanotron_fast.patch.importing import import_nanotron
from nanotron_fast.patch.lock import one_at_a_time
from nanotron_fast.patch.nanotron.fallbacks import reasons_of
from nanotron_fast.patch.nanotron.origin import replaced_by
from nanotron_fast.patch.nanotron.targets import (
    FUSED,
    ON_DISABLE,
    OPS,
    TARGETS,
    DropInOptions,
    Target,
    installed_version,
)

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "NANOTRON_FAST_OPS"
State = Literal["on", "off", "missing", "refused"]


@dataclass(frozen=True, slots=True)
class Status:
    """Whether a target is replaced, and why it is not."""

    target: Target
    state: State
    reason: str = ""


@dataclass(slots=True)
class _Replaced:
    """One attribute of a module, class or instance: what lay there, and what lies there now."""

    owner: Any
    name: str
    original: Any
    replacement: Any


@dataclass(slots=True)
class _State:
    # Operations, options, and whether to insist.
    asked: tuple[frozenset[str], DropInOptions, bool] | None = None
    status: tuple[Status, ...] = ()
    replaced: list[_Replaced] = field(default_factory=list)
    # id of an original function -> its replacement
    functions: dict[int, Callable[..., Any]] = field(default_factory=dict)
    # id of a replacement of a module's function -> the replacement and its original. Names that
    # were bound while the drop-in was on are put back by it.
    homes: dict[int, tuple[Any, Any]] = field(default_factory=dict)


_state = _State()


@one_at_a_time
def enable(
    ops: Iterable[str] | Literal["all"] = "all",
    model: torch.nn.Module | None = None,
    *,
    force: bool = False,
    **options: Any,
) -> tuple[Status, ...]:
    """Puts our operations in place of Nanotron's, which is imported if it is not yet.

    To enable again what is on changes nothing; to enable something else turns off what was on
    first. What is not replaced is logged as a warning, once, with the reason. Threads take turns,
    in this and in `disable`.

    Args:
        ops: names of `patch.nanotron.targets.OPS` and `FUSED`, or "all", which is all of OPS.
        model: a model that exists already. Its modules have the replaced methods anyway; this
            reaches functions that its modules have bound to themselves, and tells its attention
            which `rope_scaling` it has.
        force: replace what somebody else has replaced before us, too.
        options: fields of `patch.nanotron.targets.DropInOptions`: z_loss_mode, ignore_index,
            rope_scaling, padding_idx, assume_full_masks, fused.

    Returns:
        The status of every target that the installed Nanotron has.

    Raises:
        ConfigError: an operation or option is unknown, or rope_scaling is asked for without the
            operation "rope", which honours it.
        MissingPackageError: Nanotron, or what it needs, is not installed.
    """
    checked = _checked_options(options)
    asked = (_checked_ops(ops) | frozenset(FUSED if checked.fused else ()), checked, force)
    if asked[1].rope_scaling and "rope" not in asked[0]:
        raise ConfigError('rope_scaling=True needs the operation "rope" among ops')
    if _state.asked != asked:
        disable()
        import_nanotron()
        try:
            _state.status = tuple(_replace_all(*asked))
        except BaseException:
            disable()
            raise
        _state.asked = asked
        for status in _state.status:
            if status.state in ("missing", "refused"):
                logger.warning("nanotron_fast: %s %s", status.target.name, status.reason)
    if model is not None:
        _reach(model)
    return _state.status


@one_at_a_time
def disable() -> None:
    """Puts every object back to what it was. What somebody has replaced after us stays theirs."""
    for each in reversed(_state.replaced):
        if vars(each.owner).get(each.name) is each.replacement:
            setattr(each.owner, each.name, each.original)
        else:
            logger.warning(
                "nanotron_fast: %s.%s was replaced again by somebody else and is left as it is",
                getattr(each.owner, "__name__", type(each.owner).__name__),
                each.name,
            )
    for module, name, value in _bindings():
        if id(value) in _state.homes:
            setattr(module, name, _state.homes[id(value)][1])
    _state.replaced.clear()
    _state.functions.clear()
    _state.homes.clear()
    _state.asked, _state.status = None, ()
    for finish in ON_DISABLE:
        finish()


def requested_ops() -> frozenset[str]:
    """What NANOTRON_FAST_OPS asks for; everything where it is not set. Raises ConfigError."""
    words = [word.strip() for word in os.environ.get(ENVIRONMENT_VARIABLE, "all").split(",")]
    try:
        return _checked_ops("all" if words == ["all"] else [word for word in words if word])
    except ConfigError as error:
        raise ConfigError(f"{ENVIRONMENT_VARIABLE}: {error}") from None


@one_at_a_time
def status() -> tuple[Status, ...]:
    """The status of every target of the installed Nanotron; nothing while the drop-in is off.

    A fused operation that is on, and has left some of its calls to Nanotron, has the reasons.
    """
    return tuple(_with_fallbacks(each) for each in _state.status)


def _with_fallbacks(status: Status) -> Status:
    reasons = reasons_of(status.target)
    return replace(status, reason=f"left to Nanotron: {reasons}") if reasons else status


@one_at_a_time
def is_enabled() -> bool:
    """Whether anything is replaced."""
    return _state.asked is not None


def _checked_ops(ops: Iterable[str]) -> frozenset[str]:
    if ops == "all":
        return frozenset(OPS)
    if isinstance(ops, str):
        raise ConfigError(f'ops is {ops!r}: give a set of names, or "all"')
    wanted = frozenset(ops)
    known = (*OPS, *FUSED)
    unknown = sorted(map(str, wanted - set(known)))
    if unknown:
        names = ", ".join(known)
        raise ConfigError(f"unknown operations {', '.join(unknown)}: choose from {names}")
    return wanted


def _checked_options(options: dict[str, Any]) -> DropInOptions:
    known = DropInOptions.__dataclass_fields__
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name}: choose from {', '.join(known)}")
    choices = {"z_loss_mode": ("nanotron", "correct"), "padding_idx": ("nanotron", "global")}
    for name, allowed in choices.items():
        if options.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"{name} is {options[name]!r}: choose from {', '.join(allowed)}")
    if not isinstance(options.get("fused", False), bool):
        raise ConfigError(f"fused is {options['fused']!r}: choose from True, False")
    return DropInOptions(**options)


def _replace_all(ops: frozenset[str], options: DropInOptions, force: bool) -> Iterator[Status]:
    version = installed_version()
    left_out: set[str] = set()  # operations of which a target is there, and is not replaced
    for target in TARGETS:
        if version in target.versions:
            status = _replace(target, ops, options, force, left_out)
            if status.state in ("off", "refused"):
                left_out.add(target.op)
            yield status
    _replace_where_bound()


def _replace(
    target: Target,
    ops: frozenset[str],
    options: DropInOptions,
    force: bool,
    left_out: set[str],
) -> Status:
    """Replaces one target, if it may be."""
    if target.op not in ops:
        hint = ": enable(fused=True) asks for it" if target.op in FUSED else ""
        return Status(target, "off", f"{target.op} was not asked for{hint}")
    missing = [op for op in target.needs if op in left_out]
    if missing:
        return Status(target, "refused", f"needs all of {' and '.join(missing)} replaced")
    found = _find(target)
    if found is None:
        return Status(target, "missing", "is not in the installed Nanotron")
    owner, name, original = found
    # A fused operation may stand on top of a single one, which it falls back to.
    is_ours = any(original is each.replacement for each in _state.replaced)
    culprit = "" if is_ours else replaced_by(original, target.module)
    if culprit and not force:
        reason = f"was replaced by {culprit} before: force=True replaces it too"
        return Status(target, "refused", reason)
    replacement = _make(target, original, options)
    _put(owner, name, original, replacement)
    _state.functions[id(original)] = replacement
    if isinstance(owner, types.ModuleType):
        _state.homes[id(replacement)] = (replacement, original)
    return Status(target, "on")


def _find(target: Target) -> tuple[Any, str, Callable[..., Any]] | None:
    """Owner, name and what lies there."""
    try:
        owner: Any = importlib.import_module(target.module)
    except ModuleNotFoundError as error:
        if error.name is None or not target.module.startswith(error.name):
            raise
        return None
    *path, name = target.attribute.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    original = getattr(owner, "__dict__", {}).get(name)
    return None if original is None else (owner, name, original)


def _make(
    target: Target, original: Callable[..., Any], options: DropInOptions
) -> Callable[..., Any]:
    home, name = target.factory.rsplit(".", 1)
    module = importlib.import_module(f"nanotron_fast.patch.nanotron.replacements.{home}")
    replacement: Callable[..., Any] = getattr(module, name)(original, options)
    names = ("__module__", "__name__", "__qualname__", "__doc__")
    functools.update_wrapper(replacement, original, assigned=names, updated=())
    return replacement


def _put(owner: Any, name: str, original: Any, replacement: Any) -> None:
    setattr(owner, name, replacement)
    _state.replaced.append(_Replaced(owner, name, original, replacement))


def _bindings() -> Iterator[tuple[types.ModuleType, str, Any]]:
    """Every name of every module, the user's script among them, and what it is bound to."""
    for module in [*sys.modules.values()]:
        if isinstance(module, types.ModuleType) and not module.__name__.startswith(__package__):
            for name, value in [*vars(module).items()]:
                yield module, name, value


def _replace_where_bound() -> None:
    """Replaces functions in every module that has bound them, under whatever name."""
    replacements = {id(original): replacement for replacement, original in _state.homes.values()}
    for module, name, value in _bindings():
        if id(value) in replacements:
            _put(module, name, value, replacements[id(value)])


def _last_replacement(function: Any) -> Callable[..., Any] | None:
    """What stands in its place now, on top of whatever else does; None where nothing does."""
    found = None
    while (above := _state.functions.get(id(function))) is not None:
        found = function = above
    return found


def _reach(model: torch.nn.Module) -> None:
    """Replaces functions that modules of a model hold themselves, and marks their rope scaling."""
    for module in model.modules():
        for name, value in [*vars(module).items()]:
            function = value.__func__ if inspect.ismethod(value) else value
            replacement = _last_replacement(function)
            if replacement is None:
                continue
            bound = (
                types.MethodType(replacement, value.__self__) if inspect.ismethod(value) else None
            )
            _put(module, name, value, bound or replacement)
    if _state.asked is not None and _state.asked[1].rope_scaling:
        from nanotron_fast.patch.nanotron.replacements.attention import mark_rope_scaling

        mark_rope_scaling(model)
