"""Statistics by name: built in, registered by a program, or announced by another package's entry point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxprune.plugins import Named


class Statistic(Protocol):
    """Something that is accumulated over batches of feature maps.

    Attributes:
        name: what criteria ask for, set by :func:`register`.
        columns: whether ``update`` gets the columns of the contraction's input instead of its channels' maps.
        additive: batches may be joined before ``update`` gets them, the result stays the same; False where a class does
            not say so, and ``update`` then gets every call's batch as it is.
        state: everything accumulated so far, plain arrays; assigning a saved one goes on from there, to the bit. What
            was read from it stays as it is: ``update`` makes new arrays.
    """

    name: ClassVar[str] = ""
    columns: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    state: dict[str, NDArray[Any]]

    def update(self, maps: NDArray[Any]) -> None:
        """Take in one batch: maps [samples, channels, *space], or columns [parts, rows, n].

        Raises:
            NotFinite: there is NaN or infinity in it.
        """

    def result(self) -> dict[str, NDArray[np.float64]]:
        """The finished arrays by the names that ``Maps`` has for them; empty where nothing could be computed."""


ENTRY_POINT = "onnxprune.statistics"
T = TypeVar("T", bound=type[Statistic])
_named: Named[type[Statistic]] = Named("statistic", ENTRY_POINT)


def register(name: str, *, columns: bool = False) -> Callable[[T], T]:
    """Register a class made without arguments under the name that criteria ask for, as a decorator.

    Args:
        name: what stands in a criterion's ``needs``.
        columns: ``update`` gets columns [parts, rows, n] instead of maps [samples, channels, *space].

    Raises:
        ValueError: the name is taken.
    """

    def decorate(statistic: T) -> T:
        _named.add(name, statistic)
        statistic.name, statistic.columns = name, columns
        return statistic

    return decorate


def unregister(name: str) -> None:
    """Forget a statistic, so that another can take its name."""
    _named.remove(name)


def get(name: str) -> type[Statistic]:
    """The class of that name; make one per contraction.

    Raises:
        UsageError: there is none; the nearest name is suggested.
    """
    return _named.get(name)


def names() -> list[str]:
    """All statistics, sorted."""
    return _named.names()
