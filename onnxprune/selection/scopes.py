"""How many units each group loses: a ratio in every group, or one threshold over groups that compete."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxprune.labels.label import Ids

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RankedGroup:
    """One group as the allocation sees it.

    Attributes:
        values: [units], the lowest go first; -inf where a unit is gone already, NaN where its whole row is.
        classes: [units], every class loses the same share. steps: in how many equal steps it can be cut.
        counts: numbers of steps that may go, ascending, see :func:`allowed_counts`.
        ratio: share to remove. alone: the ratio holds for this group, whatever the scope.
        ranking_scope: groups with equal ranking_scopes share a threshold.
        gone: steps that are gone already.
    """

    values: Array
    classes: Ids
    steps: int
    counts: Ids
    ratio: float
    alone: bool = False
    ranking_scope: Hashable = None
    gone: int = 0

    @property
    def per_step(self) -> int:
        """Units that one step takes."""
        return self.values.size // self.steps


def allowed_counts(size: int, steps: int, *, round_to: int = 1, step: int = 1, widest: float = 1.0) -> Ids:
    """Numbers of steps that may go from a group of ``size`` units, ascending, at least one; never all of them.

    Args:
        round_to: what is kept is a multiple where it can be had. step: what goes is a multiple, always.
        widest: the largest share to remove.
    """
    counts = np.arange(steps)
    if round_to == step == 1 and widest >= 1:
        return counts
    units = counts * (size // steps)
    held = (units % step == 0) & (units <= widest * size + 1e-9)
    even = held & ((size - units) % round_to == 0)
    return np.asarray(counts[even if even.any() else held])


def nearest_count(counts: Ids, target: float, rounding: str) -> int:
    """The allowed count for a wanted number of steps, which is rarely whole; ties go to the smaller cut."""
    if target <= 0:
        return 0
    if rounding == "up":
        above = counts[counts >= target - 1e-9]
        return int(above[0] if above.size else counts[-1])
    if rounding == "down":
        below = counts[counts <= target + 1e-9]
        return int(below[-1] if below.size else counts[0])
    return int(counts[np.argmin(np.abs(counts - target) + counts * 1e-9)])


def in_order(values: Array, classes: Ids) -> tuple[Ids, Ids]:
    """Units sorted by class and then by score, and the rank that each unit (in its own place) has in its class."""
    sizes = np.bincount(classes)
    # Both are stable, and put what is gone (NaN) last.
    order = np.argsort(values, kind="stable") if sizes.size == 1 else np.lexsort((values, classes))
    rank = np.empty(values.size, dtype=np.int64)
    rank[order] = np.arange(values.size) - (np.cumsum(sizes) - sizes)[classes[order]]
    return order, rank


def weakest(values: Array, classes: Ids, steps: int, count: int) -> Ids:
    """The units (numbers within the group) that go in ``count`` steps: the lowest of every class that is alive."""
    sizes = np.bincount(classes)
    if sizes.size == 1:
        return _least(values, values.size // steps * count)
    _, rank = in_order(values, classes)
    return np.flatnonzero((rank < (sizes // steps * count)[classes]) & ~np.isnan(values))


def _least(values: Array, count: int) -> Ids:
    """Positions of the ``count`` least of some numbers, those in front of equal ones; NaN is never among them."""
    if not count:
        return np.zeros(0, np.int64)
    # A threshold takes time in proportion to the numbers, sorting them all does not; NaN counts as the largest.
    bound = np.partition(values, count - 1)[count - 1]
    if np.isnan(bound):
        return np.flatnonzero(~np.isnan(values))
    taken = values < bound
    ties = np.flatnonzero(values == bound)[: count - np.count_nonzero(taken)]
    taken[ties] = True
    return np.flatnonzero(taken)


def step_scores(ranked_group: RankedGroup, add: bool = False) -> Array:
    """Scores [steps] of a group's steps, ascending: one unit of every class that is alive, averaged or added up."""
    sizes = np.bincount(ranked_group.classes)
    _, rank = in_order(ranked_group.values, ranked_group.classes)
    at = rank // (sizes // ranked_group.steps)[ranked_group.classes]
    alive = ~np.isnan(ranked_group.values)
    total = np.bincount(at[alive], weights=ranked_group.values[alive], minlength=ranked_group.steps).astype(np.float64)
    if not add:
        total /= np.maximum(np.bincount(at[alive], minlength=ranked_group.steps), 1)
    return np.asarray(np.maximum.accumulate(total))


def lamp(values: Array) -> Array:
    """Scores [units] that compare across layers: s_u^2 / sum of s_v^2 over the units v with s_v >= s_u.

    Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, with units in place of weights.
    Scores below 0 are moved up so that the least is 0; what is not finite stays.
    """
    result = values.copy()
    alive = np.flatnonzero(np.isfinite(values))
    if not alive.size:
        return result
    scores = values[alive] - min(0.0, float(values[alive].min()))
    order = np.argsort(scores, kind="stable")
    square = np.square(scores[order])
    tail = np.cumsum(square[::-1])[::-1]
    # Units with equal scores count each other.
    tail = tail[np.searchsorted(scores[order], scores[order], side="left")]
    result[alive[order]] = np.divide(square, tail, out=np.zeros_like(square), where=tail > 0)
    return result


def local_counts(ranked: Sequence[RankedGroup], rounding: str) -> list[int]:
    """Steps that every group loses by its own ratio."""
    return [max(nearest_count(c.counts, c.ratio * c.steps, rounding), c.gone) for c in ranked]


def threshold_counts(ranked: Sequence[RankedGroup], rounding: str, add: bool = False) -> list[int]:
    """Steps that every group loses under one threshold: the cheapest steps first, until as many units are gone as the
    groups' ratios add up to.

    A group goes from one of its allowed counts to the next at once, at the mean score of the steps between.
    """
    owner, scores, units, reach = [], [], [], []
    for number, ranked_group in enumerate(ranked):
        counts = ranked_group.counts if ranked_group.counts[0] == 0 else np.concatenate([[0], ranked_group.counts])
        if counts.size < 2:
            continue
        ahead = np.add.reduceat(step_scores(ranked_group, add)[: counts[-1]], counts[:-1]) / np.diff(counts)
        owner.append(np.full(ahead.size, number))
        scores.append(np.maximum.accumulate(ahead))
        units.append(np.diff(counts) * ranked_group.per_step)
        reach.append(counts[1:])
    result = [0] * len(ranked)
    if not owner:
        return result
    who, score, size, count = (np.concatenate(x) for x in (owner, scores, units, reach))
    order = np.argsort(score, kind="stable")
    taken = np.concatenate([[0], np.cumsum(size[order])])
    target = sum(c.ratio * c.values.size for c in ranked)
    stop = max(_prefix(taken, target, rounding), int(np.isneginf(score).sum()))
    for i in order[:stop]:
        result[who[i]] = int(count[i])
    return result


def _prefix(taken: Ids, target: float, rounding: str) -> int:
    """How many of the steps to take, given the units that are gone after each number of them, [steps + 1]."""
    return int(np.searchsorted(taken, nearest_count(taken, target, rounding)))


def allocate(ranked: Sequence[RankedGroup], scope: str, rounding: str, add: bool = False) -> list[int]:
    """Steps that every group loses.

    Args:
        ranked: the groups. scope: ``local``, else one threshold per ranking_scope.
        rounding: ``nearest``, ``up`` or ``down``. add: a step's score is the sum of its units' scores, not the mean.
    """
    result = [0] * len(ranked)
    pools: dict[Hashable, list[int]] = {}
    for number, ranked_group in enumerate(ranked):
        if scope == "local" or ranked_group.alone:
            result[number] = local_counts([ranked_group], rounding)[0]
        else:
            pools.setdefault(ranked_group.ranking_scope, []).append(number)
    for members in pools.values():
        for number, count in zip(members, threshold_counts([ranked[m] for m in members], rounding, add), strict=True):
            result[number] = count
    return result
