"""Criteria by name: built in, registered by a program, or announced by another package's entry point."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from onnxprune.errors import ExtensionError
from onnxprune.plugins import Named

Criterion = Callable[..., "NDArray[Any] | None"]
"""``f(slot)``, or ``f(slot, maps)`` where it needs feature maps: scores [channels] of one slot, higher matters more;
None where the criterion has nothing to say about the slot."""

ENTRY_POINT = "onnxprune.criteria"
_named: Named[Criterion] = Named("criterion", ENTRY_POINT)


def register(
    name: str,
    *,
    reads_all: bool = False,
    needs: Sequence[str] = (),
    comparable: bool = False,
    of_squares: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
) -> Callable[[Criterion], Criterion]:
    """Register a criterion under a name, as a decorator.

    Args:
        name: what ``--criterion`` takes.
        reads_all: the scores depend on every weight, so that NaN in a weight shows in them.
        needs: statistics of feature maps (see :class:`Maps`) that the criterion reads; with any, it takes two arguments
            and is asked about contractions only. Without, what :func:`needs_of` finds.
        comparable: scores of different layers compare as they are, so that nothing is divided out by default.
        of_squares: the same as a function of the sum of each channel's squared weights, [channels], where the criterion
            is one: those sums are found for all axes of a weight at once, and the criterion itself is not called.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(criterion: Criterion) -> Criterion:
        _named.add(name, criterion)
        criterion.reads_all = reads_all  # type: ignore[attr-defined]
        criterion.comparable = comparable  # type: ignore[attr-defined]
        criterion.of_squares = of_squares  # type: ignore[attr-defined]
        criterion.needs = tuple(needs) or needs_of(criterion)  # type: ignore[attr-defined]
        return criterion

    return decorate


def needs(*statistics: str) -> Callable[[Criterion], Criterion]:
    """Say what statistics of feature maps a function reads, without registering it, as a decorator."""

    def decorate(criterion: Criterion) -> Criterion:
        criterion.needs = statistics  # type: ignore[attr-defined]
        return criterion

    return decorate


def needs_of(criterion: Criterion) -> tuple[str, ...]:
    """Names of the statistics that a criterion reads; empty for one that sees weights alone.

    A function that nobody registered or marked needs ``moments`` if it takes two arguments, nothing if it takes one.
    """
    said = getattr(criterion, "needs", None)
    if said is not None:
        return tuple(said)
    try:
        parameters = list(inspect.signature(criterion).parameters.values())
    except (TypeError, ValueError):  # builtins and compiled functions may not tell
        return ()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in by_position and p.default is p.empty]
    taken = [p for p in parameters if p.kind in by_position or p.kind is p.VAR_POSITIONAL]
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if len(required) > 2 or not taken or named:
        raise ExtensionError(
            f"The criterion {getattr(criterion, '__name__', criterion)!r} cannot be called with a slot and maps",
            hint="It takes one argument, a slot, or two, a slot and the maps in front of it.",
        )
    return ("moments",) if len(required) > 1 else ()


def unregister(name: str) -> None:
    """Forget a criterion, so that another can take its name."""
    _named.remove(name)


def get(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        UsageError: there is none; the nearest name is suggested.
    """
    return _named.get(name)


def names() -> list[str]:
    """All criteria, sorted."""
    return _named.names()
