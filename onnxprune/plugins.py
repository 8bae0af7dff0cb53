"""What other packages announce: objects under entry point groups."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from onnxprune.errors import UsageError


def announced(group: str) -> dict[str, Any]:
    """{name: object} of an entry point group, loaded.

    Raises:
        UsageError: one cannot be loaded; says which package it is of.
    """
    found = {}
    for point in entry_points(group=group):
        try:
            found[point.name] = point.load()
        except Exception as error:
            package = point.dist.name if point.dist is not None else point.value
            raise UsageError(
                f"The extension {point.name!r} of {package} cannot be loaded: {type(error).__name__}: {error}",
                hint=f"Mend or uninstall {package}.",
            ) from error
    return found
