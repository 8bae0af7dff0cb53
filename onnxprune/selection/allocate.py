"""How many and which units go: ratios, patterns and rounding under each group's constraints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import UsageError, nearest
from onnxprune.groups.units import Group
from onnxprune.labels.label import Ids


@dataclass(slots=True)
class Request:
    """What the user asked for.

    ``layers`` maps glob patterns over node or weight names to ratios; ``include`` and ``exclude`` are such patterns.
    """

    ratio: float = 0.3
    layers: Mapping[str, float] = field(default_factory=dict)
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    round_to: int = 1

    def __post_init__(self) -> None:
        for what, ratio in (("ratio", self.ratio), *((f"--layer {p}", r) for p, r in self.layers.items())):
            if not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
                raise UsageError(f"{what} {ratio} is out of range.", hint="Allowed: 0 <= ratio < 1, such as 0.3.")
        if self.round_to < 1:
            raise UsageError(f"--round-to {self.round_to} is out of range.", hint="Allowed: whole numbers from 1.")


def check_patterns(request: Request, names: Iterable[str]) -> None:
    """Every pattern must match some node or weight of the model.

    Raises:
        UsageError: one does not; the nearest name is suggested.
    """
    known = sorted({n for n in names if n})
    for option, patterns in (
        ("--layer", request.layers),
        ("--include", request.include),
        ("--exclude", request.exclude),
    ):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in known):
                raise UsageError(f"{option} {pattern!r} matches no node or weight.", hint=_wider(pattern, known))


def _wider(pattern: str, known: Sequence[str]) -> str:
    """A hint for a pattern without a match: the same with stars around it where that matches, else the nearest name."""
    wide = f"*{pattern.strip('*')}*"
    if wide != "**" and any(matches(name, wide) for name in known):
        return f"A pattern matches whole names. Did you mean {wide!r}?"
    return nearest(pattern, known)


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches a name, case-sensitively."""
    return name == pattern or fnmatchcase(name, pattern)


def ratio_of(names: Sequence[str], request: Request) -> float | None:
    """The ratio of a group that has these node and weight names; None where it is excluded. Later patterns win."""
    if any(matches(n, p) for n in names for p in request.exclude):
        return None
    if request.include and not any(matches(n, p) for n in names for p in request.include):
        return None
    ratio = request.ratio
    for pattern, own in request.layers.items():
        if any(matches(n, pattern) for n in names):
            ratio = own
    return ratio


def removable_steps(group: Group, ratio: float, round_to: int = 1) -> int:
    """Equal steps to cut from a group: nearest to the ratio, one stays, kept units a multiple where possible."""
    if not group.prunable:
        return 0
    per_step = group.size // group.steps
    target = ratio * group.steps
    steps = np.arange(group.steps)
    fits = (group.size - steps * per_step) % round_to == 0
    candidates = steps[fits] if round_to > 1 and fits.any() else steps
    # Ties go to the smaller cut, so that rounding never surprises by taking more.
    return int(candidates[np.argmin(np.abs(candidates - target) + candidates * 1e-9)])


def weakest(group: Group, scores: NDArray[np.float64], steps: int) -> Ids:
    """The units (numbers within the group) that go: the lowest scores of every class, the same share of each."""
    sizes = np.bincount(group.classes)
    quota = sizes // group.steps * steps
    order = np.lexsort((np.arange(group.size), scores, group.classes))
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(group.size, dtype=np.int64)
    rank[order] = np.arange(group.size) - starts[group.classes[order]]
    return np.flatnonzero(rank < quota[group.classes])
