"""Extensions by name: built in, registered by a program, or announced by another package's entry point."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar

from onnxprune.errors import UsageError, nearest

T = TypeVar("T")


def announced(group: str) -> dict[str, Any]:
    """{name: object} of an entry point group, loaded.

    Raises:
        UsageError: one cannot be loaded; says which package it is of.
    """
    found = {}
    for point in entry_points(group=group):
        try:
            found[point.name] = point.load()
        except (Exception, SystemExit) as error:
            package = point.dist.name if point.dist is not None else point.value
            raise UsageError(
                f"The extension {point.name!r} of {package} cannot be loaded: {type(error).__name__}: {error}",
                hint=f"Mend or uninstall {package}.",
            ) from error
    return found


class Named(Generic[T]):
    """A table of extensions of one kind; those of an entry point group join it when names are first looked at.

    Args:
        kind: what one of them is called in messages.
        group: the entry point group.
        built_in: those there are from the start; as ``package.module:name`` where they are imported when asked for.
    """

    def __init__(self, kind: str, group: str, built_in: Mapping[str, T] | None = None) -> None:
        self._kind, self._group, self._loaded = kind, group, False
        self._table: dict[str, T] = dict(built_in or {})

    def add(self, name: str, extension: T) -> None:
        """Enter an extension.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._table:
            raise ValueError(f"a {self._kind} named {name!r} is already registered")
        self._table[name] = extension

    def remove(self, name: str) -> None:
        """Forget an extension, so that another can take its name."""
        self._table.pop(name, None)

    def get(self, name: str) -> T:
        """Return the extension of that name.

        Raises:
            UsageError: there is none; the nearest name is suggested.
        """
        known = self.names()
        if name not in self._table:
            raise UsageError(f"Unknown {self._kind} {name!r}.", hint=nearest(name, known))
        extension: T = self._table[name]
        if isinstance(extension, str):
            extension = self._table[name] = resolve_name(extension)
        return extension

    def names(self) -> list[str]:
        """All names, sorted."""
        if not self._loaded:
            for name, extension in announced(self._group).items():
                self._table.setdefault(name, extension)
            self._loaded = True
        return sorted(self._table)
