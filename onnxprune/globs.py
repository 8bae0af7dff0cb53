"""Globs over names of nodes and weights, as in a shell: ``*conv*``, ``block[12].*``; case counts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from onnxprune.errors import UsageError, nearest

T = TypeVar("T")


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a name; a name with brackets also matches itself."""
    return name == pattern or fnmatchcase(name, pattern)


def any_match(names: Iterable[str], patterns: Collection[str]) -> bool:
    """Return whether one of several patterns matches one of the names."""
    return any(matches(name, pattern) for name in names for pattern in patterns)


def reason_to_exclude(names: Sequence[str], include: Collection[str], exclude: Collection[str]) -> str:
    """Return the reason why patterns exclude something with these names.

    Args:
        names: its names.
        include: patterns, of which one has to match; empty: everything is included.
        exclude: patterns, of which none may match.

    Returns:
        ``excluded``, ``not included``, or an empty text where nothing excludes it.
    """
    if any_match(names, exclude):
        return "excluded"
    return "not included" if include and not any_match(names, include) else ""


def last_match(names: Sequence[str], values: Mapping[str, T]) -> tuple[str, T] | None:
    """Return the last pattern that matches one of the names, with its value; None where no pattern matches."""
    matching = [(pattern, value) for pattern, value in values.items() if any_match(names, [pattern])]
    return matching[-1] if matching else None


def check_patterns(requested: Iterable[tuple[str, Collection[str]]], names: Iterable[str]) -> None:
    """Check that every pattern matches some node or weight of the model.

    Args:
        requested: pairs of an option and its patterns.
        names: names of nodes and weights.

    Raises:
        UsageError: one does not; the nearest name is suggested.
    """
    requested = [(option, patterns) for option, patterns in requested if patterns]
    existing = sorted({n for n in names if n}) if requested else []
    for option, patterns in requested:
        for pattern in patterns:
            if not any_match(existing, [pattern]):
                raise UsageError(f"{option} {pattern!r} matches no node or weight.", hint=_wider(pattern, existing))


def _wider(pattern: str, existing: Sequence[str]) -> str:
    """Return a hint for a pattern without a match: the pattern between stars if that matches, else the nearest name."""
    wildcard = f"*{pattern.strip('*')}*"
    if wildcard != "**" and any_match(existing, [wildcard]):
        return f"A pattern matches whole names. Did you mean {wildcard!r}?"
    return nearest(pattern, existing)
