"""Counts that keep most within a budget: knapsacks over costs that are linearised anew at every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxprune.budget.costs import Cost, Costs
from onnxprune.budget.knapsack import Packed, pack
from onnxprune.budget.sizes import Counts

Array = NDArray[np.float64]

_ROUNDS = 12
# Rows of a peak beyond this many say little that the dearest ones do not.
_MOST_ROWS = 64
_HALVINGS = 30


@dataclass(frozen=True, slots=True)
class Choices:
    """What every group may do: keep ``kept`` [levels] of its steps, ascending, at a loss [levels].

    Nothing here knows what a step is: a layer that may be taken apart as well would be another column of counts, whose
    levels are its ranks, with a cost that reads them.
    """

    kept: list[Counts]
    losses: list[Array]

    def counts(self, levels: Sequence[int] | NDArray[np.int64]) -> Counts:
        """Counts [groups] of levels [groups]."""
        return np.array([k[i] for k, i in zip(self.kept, levels, strict=True)], dtype=np.int64)

    def loss(self, levels: Sequence[int] | NDArray[np.int64]) -> float:
        """The loss of levels [groups]."""
        return float(sum(x[i] for x, i in zip(self.losses, levels, strict=True)))

    def nearest(self, share: float) -> NDArray[np.int64]:
        """Levels [groups] nearest to the same share kept of every group."""
        return np.array([int(np.argmin(np.abs(k - share * k[-1]))) for k in self.kept], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Limit:
    """A cost and the most it may be."""

    cost: Cost
    most: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """Counts [groups] with their loss; ``bound``: with the costs linearised there, no counts within it lose less."""

    kept: Counts
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the loss is above the bound, as a share of the loss."""
        return max(0.0, 1.0 - self.bound / self.loss) if self.loss > 0 else 0.0


def allocate(choices: Choices, limits: Sequence[Limit]) -> Allocation | None:
    """Counts within the limits that lose least; None where none were found.

    What a layer costs depends on the group it reads and on the one it makes, so costs do not add up over groups. Each
    round takes costs as sums of what single groups save at the last counts, solves that knapsack, and holds the answer
    against the true costs; the limits of the next knapsack make up for the difference. The best answer within
    the true limits is then improved by single steps, as long as one fits.
    """
    levels = _start(choices, limits)
    if levels is None:
        return None
    best, bound = levels, -np.inf
    pressure = np.ones(len(limits))
    for _ in range(_ROUNDS):
        packed = _round(choices, limits, levels, pressure)
        if packed is None:
            pressure = 0.5 * (1 + pressure)
            continue
        before, levels = levels, packed.levels
        found = _overrun(choices, limits, levels)
        if found.max() <= 1 and choices.loss(levels) <= choices.loss(best):
            best, bound = levels, packed.bound
        if (levels == before).all() and found.max() <= 1:
            break
        pressure = np.clip(pressure / found, 0.5, 1.5)
    best = _polished(choices, limits, best)
    last = _round(choices, limits, best, np.ones(len(limits)))
    bound = last.bound if last is not None else bound
    return Allocation(choices.counts(best), choices.loss(best), min(bound, choices.loss(best)))


def uniform(choices: Choices, limits: Sequence[Limit]) -> Allocation | None:
    """The largest share that every group can keep alike within the limits; None where none was found.

    What rounding to whole steps leaves of the limits is given to single groups, as long as a step fits.
    """
    levels = _start(choices, limits)
    if levels is None:
        return None
    levels = _polished(choices, limits, levels)
    return Allocation(choices.counts(levels), choices.loss(levels), -np.inf)


def least(choices: Choices, cost: Cost) -> Counts:
    """Counts [groups] at which the cost is near its least: of single changes, none lowers it."""
    levels = np.zeros(len(choices.kept), dtype=np.int64)
    for _ in range(_ROUNDS):
        before = levels.copy()
        for group, kept in enumerate(choices.kept):
            tried = np.repeat(choices.counts(levels)[None], kept.size, axis=0)
            tried[:, group] = kept
            levels[group] = int(np.argmin(cost.rows(tried).max(axis=1)))
        if (levels == before).all():
            break
    return choices.counts(levels)


def _start(choices: Choices, limits: Sequence[Limit]) -> NDArray[np.int64] | None:
    """The largest share kept alike that fits, by bisection; else the counts at which costs are least."""
    high, low = 1.0, 0.0
    fits: NDArray[np.int64] | None = None
    for _ in range(_HALVINGS):
        share = 1.0 if fits is None and high == 1.0 and low == 0.0 else 0.5 * (high + low)
        levels = choices.nearest(share)
        if _overrun(choices, limits, levels).max(initial=0.0) <= 1:
            fits, low = levels, share
            if share == 1.0:
                return fits
        elif share == 1.0:
            high = 1.0 - 1e-9
        else:
            high = share
    if fits is not None:
        return fits
    for limit in limits:
        kept = least(choices, limit.cost)
        levels = np.array([int(np.searchsorted(k, n)) for k, n in zip(choices.kept, kept, strict=True)])
        if _overrun(choices, limits, levels).max() <= 1:
            return levels
    return None


def _overrun(choices: Choices, limits: Sequence[Limit], levels: NDArray[np.int64]) -> Array:
    """Costs over limits [limits]."""
    kept = choices.counts(levels)[None]
    return np.array([float(x.cost.rows(kept).max()) / x.most for x in limits])


def _round(choices: Choices, limits: Sequence[Limit], levels: NDArray[np.int64], pressure: Array) -> Packed | None:
    """The knapsack with costs linearised at some levels; ``pressure`` scales the limits."""
    here = choices.counts(levels)
    owner = np.repeat(np.arange(len(choices.kept)), [k.size for k in choices.kept])
    tried = np.repeat(here[None], owner.size, axis=0)
    tried[np.arange(owner.size), owner] = np.concatenate(choices.kept)
    columns, most = [], []
    for limit, press in zip(limits, pressure, strict=True):
        base, rows = limit.cost.rows(here[None])[0], limit.cost.rows(tried)
        chosen = _binding(rows, base, limit.most)
        columns.append((rows - base)[:, chosen])
        most.append(limit.most * press - base[chosen])
    change = np.concatenate(columns, axis=1)
    splits = np.cumsum([k.size for k in choices.kept])[:-1]
    return pack(choices.losses, np.split(change, splits), np.concatenate(most))


def _binding(rows: Costs, base: Array, most: float) -> NDArray[np.int64]:
    """Rows that may come to exceed the limit: the dearest ones."""
    dearest = np.maximum(rows.max(axis=0), base)
    order = np.argsort(-dearest, kind="stable")[:_MOST_ROWS]
    over = order[dearest[order] > most]
    return np.asarray(over if over.size else order[:1])


def _polished(choices: Choices, limits: Sequence[Limit], levels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Levels after the single changes that lower the loss most, as long as one fits."""
    levels = levels.copy()
    owner = np.repeat(np.arange(len(choices.kept)), [k.size for k in choices.kept])
    level = np.concatenate([np.arange(k.size) for k in choices.kept])
    loss, kept = np.concatenate(choices.losses), np.concatenate(choices.kept)
    for _ in range(4 * len(choices.kept)):
        gain = np.array([x[i] for x, i in zip(choices.losses, levels, strict=True)])[owner] - loss
        better = np.flatnonzero(gain > 1e-12 * max(1.0, float(np.abs(loss).max())))
        if not better.size:
            break
        tried = np.repeat(choices.counts(levels)[None], better.size, axis=0)
        tried[np.arange(better.size), owner[better]] = kept[better]
        fits = np.all([x.cost.rows(tried).max(axis=1) <= x.most for x in limits], axis=0)
        if not fits.any():
            break
        best = better[fits][np.argmax(gain[better][fits])]
        levels[owner[best]] = level[best]
    return levels
