"""Passes by name: built in, registered by a program, or announced by another package's entry point."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from onnxprune.errors import UsageError, nearest
from onnxprune.passes.prune import Prune
from onnxprune.passes.state import Pass
from onnxprune.passes.validate import Validate
from onnxprune.plugins import announced

ENTRY_POINT = "onnxprune.passes"
T = TypeVar("T", bound="Pass | type[Pass]")
_table: dict[str, Pass | type[Pass]] = {"prune": Prune, "validate": Validate}
_loaded = False


def register(name: str) -> Callable[[T], T]:
    """Register a pass under a name, as a decorator: a function over the state, or a class made without arguments.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(stage: T) -> T:
        if name in _table:
            raise ValueError(f"a pass named {name!r} is already registered")
        _table[name] = stage
        return stage

    return decorate


def unregister(name: str) -> None:
    """Forget a pass, so that another can take its name."""
    _table.pop(name, None)


def get(name: str) -> Pass:
    """The pass of that name.

    Raises:
        UsageError: there is none; the nearest name is suggested.
    """
    known = names()
    if name not in _table:
        raise UsageError(f"Unknown pass {name!r}.", hint=nearest(name, known))
    stage = _table[name]
    return stage() if isinstance(stage, type) else stage


def names() -> list[str]:
    """All passes, sorted."""
    global _loaded
    if not _loaded:
        for name, stage in announced(ENTRY_POINT).items():
            _table.setdefault(name, stage)
        _loaded = True
    return sorted(_table)
