"""Globs over the names of nodes and weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from onnxprune.errors import UsageError, nearest


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches a name, case-sensitively."""
    return name == pattern or fnmatchcase(name, pattern)


def check(given: Iterable[tuple[str, Collection[str]]], names: Iterable[str]) -> None:
    """Every pattern must match some node or weight of the model.

    Args:
        given: pairs of an option and its patterns. names: of nodes and weights.

    Raises:
        UsageError: one does not; the nearest name is suggested.
    """
    given = [(option, patterns) for option, patterns in given if patterns]
    known = sorted({n for n in names if n}) if given else []
    for option, patterns in given:
        for pattern in patterns:
            if not any(matches(name, pattern) for name in known):
                raise UsageError(f"{option} {pattern!r} matches no node or weight.", hint=_wider(pattern, known))


def _wider(pattern: str, known: Sequence[str]) -> str:
    """A hint for a pattern without a match: the same with stars around it where that matches, else the nearest name."""
    wide = f"*{pattern.strip('*')}*"
    if wide != "**" and any(matches(name, wide) for name in known):
        return f"A pattern matches whole names. Did you mean {wide!r}?"
    return nearest(pattern, known)
