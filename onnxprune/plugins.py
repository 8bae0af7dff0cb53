"""Extensions by name: built in, registered by a program, or announced by another package's entry point."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar

from onnxprune.errors import UsageError, nearest

T = TypeVar("T")


def announced(group: str) -> dict[str, Any]:
    """Load the extensions of an entry point group, {name: object}.

    Raises:
        UsageError: one cannot be loaded; the message names its package.
    """
    points = {}
    for point in entry_points(group=group):
        try:
            points[point.name] = point.load()
        except (Exception, SystemExit) as error:
            package = point.dist.name if point.dist is not None else point.value
            raise UsageError(
                f"The extension {point.name!r} of {package} cannot be loaded: {type(error).__name__}: {error}",
                hint=f"Repair or uninstall {package}.",
            ) from error
    return points


class Named(Generic[T]):
    """A table of extensions of one kind; those of an entry point group join it when names are first looked at.

    Args:
        kind: name of the kind in messages.
        group: name of the entry point group.
        built_in: built-in extensions by name; as ``package.module:name`` where they are imported on first use.
    """

    def __init__(self, kind: str, group: str, built_in: Mapping[str, T] | None = None) -> None:
        self._kind, self._group, self._loaded = kind, group, False
        self._table: dict[str, T] = dict(built_in or {})

    def add(self, name: str, extension: T) -> None:
        """Add an extension.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._table:
            raise ValueError(f"a {self._kind} named {name!r} is already registered")
        self._table[name] = extension

    def remove(self, name: str) -> None:
        """Remove an extension, so that another can take its name."""
        self._table.pop(name, None)

    def get(self, name: str) -> T:
        """Return the extension of that name.

        Raises:
            UsageError: there is no such extension; the nearest name is suggested.
        """
        known = self.names()
        if name not in self._table:
            raise UsageError(f"Unknown {self._kind} {name!r}.", hint=nearest(name, known))
        extension: T = self._table[name]
        if isinstance(extension, str):
            extension = self._table[name] = resolve_name(extension)
        return extension

    def names(self) -> list[str]:
        """Return all names, sorted."""
        if not self._loaded:
            for name, extension in announced(self._group).items():
                self._table.setdefault(name, extension)
            self._loaded = True
        return sorted(self._table)
