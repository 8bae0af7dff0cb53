"""Passes by name: built in, registered by a program, or announced by another package's entry point."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from onnxprune.passes.exact import Exact
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.flush import Flush
from onnxprune.passes.prune import Prune
from onnxprune.passes.recover import Recover
from onnxprune.passes.state import Pass
from onnxprune.passes.validate import Validate
from onnxprune.plugins import Named

ENTRY_POINT = "onnxprune.passes"
T = TypeVar("T", bound="Pass | type[Pass]")
_BUILT_IN: dict[str, Pass | type[Pass]] = {
    "prune": Prune,
    "factorize": Factorize,
    "exact": Exact,
    "flush": Flush,
    "recover": Recover,
    "validate": Validate,
}
_named: Named[Pass | type[Pass]] = Named("pass", ENTRY_POINT, _BUILT_IN)


def register(name: str) -> Callable[[T], T]:
    """Register a pass under a name, as a decorator: a function over the state, or a class made without arguments.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(stage: T) -> T:
        _named.add(name, stage)
        return stage

    return decorate


def unregister(name: str) -> None:
    """Forget a pass, so that another can take its name."""
    _named.remove(name)


def get(name: str) -> Pass:
    """The pass of that name.

    Raises:
        UsageError: there is none; the nearest name is suggested.
    """
    stage = _named.get(name)
    return stage() if isinstance(stage, type) else stage


def names() -> list[str]:
    """All passes, sorted."""
    return _named.names()
