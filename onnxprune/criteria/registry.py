"""Criteria by name: built in, registered by a program, or announced by another package's entry point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from onnxprune.criteria.slot import Slot
from onnxprune.errors import UsageError, nearest
from onnxprune.plugins import announced

Criterion = Callable[[Slot], "NDArray[Any] | None"]
"""Scores [channels] of one slot, higher matters more; None where the criterion has nothing to say about the slot."""

ENTRY_POINT = "onnxprune.criteria"
_table: dict[str, Criterion] = {}
_loaded = False


def register(name: str, *, reads_all: bool = False) -> Callable[[Criterion], Criterion]:
    """Register a criterion under a name, as a decorator.

    Args:
        name: what ``--criterion`` takes.
        reads_all: the scores depend on every weight, so that NaN in a weight shows in them.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(criterion: Criterion) -> Criterion:
        if name in _table:
            raise ValueError(f"a criterion named {name!r} is already registered")
        _table[name] = criterion
        criterion.reads_all = reads_all  # type: ignore[attr-defined]
        return criterion

    return decorate


def unregister(name: str) -> None:
    """Forget a criterion, so that another can take its name."""
    _table.pop(name, None)


def get(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        UsageError: there is none; the nearest name is suggested.
    """
    known = names()
    if name not in _table:
        raise UsageError(f"Unknown criterion {name!r}.", hint=nearest(name, known))
    return _table[name]


def names() -> list[str]:
    """All criteria, sorted."""
    global _loaded
    if not _loaded:
        for name, criterion in announced(ENTRY_POINT).items():
            _table.setdefault(name, criterion)
        _loaded = True
    return sorted(_table)
