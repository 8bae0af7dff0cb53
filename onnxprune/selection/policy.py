"""From the scores of channels in several weights to one score per unit, and from units to the columns of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxprune.labels.label import Ids

Array = NDArray[np.float64]


class Part(NamedTuple):
    """Scores [channels] of one weight, the unit of every channel, and where the weight stands: larger is later."""

    units: Ids
    scores: Array
    place: tuple[int, ...] = (0,)


def combine(parts: Sequence[Part], size: int, policy: str) -> Array:
    """One score per unit, [size]; units that no part says anything about get the mean of the others.

    Args:
        parts: at least one. size: units of the group.
        policy: ``sum``, ``average`` or ``max`` of all scores that a unit has; ``backward``: the sum of those it has in
            the last part that knows the unit.
    """
    units = np.concatenate([p.units for p in parts])
    scores = np.concatenate([p.scores for p in parts])
    count = np.bincount(units, minlength=size)
    if policy == "backward":
        result = np.zeros(size)
        for part in sorted(parts, key=lambda p: p.place):
            own = np.bincount(part.units, weights=part.scores, minlength=size)
            present = np.unique(part.units)
            result[present] = own[present]
    elif policy == "max":
        result = np.full(size, -np.inf)
        np.maximum.at(result, units, scores)
    else:
        result = np.bincount(units, weights=scores, minlength=size).astype(np.float64, copy=False)
        if policy == "average":
            result = result / np.maximum(count, 1)
    if units.size and np.count_nonzero(count) < size:
        result[count == 0] = result[count > 0].mean()
    return result


def columns(classes: Ids, steps: int) -> Ids:
    """The column of every unit: its index among the units of its row, [units], in ``steps`` columns.

    Where rows differ in length, a longer one gives several neighbouring units to a column.
    """
    order = np.argsort(classes, kind="stable")
    sizes = np.bincount(classes)
    rank = np.empty(classes.size, dtype=np.int64)
    rank[order] = np.arange(classes.size) - (np.cumsum(sizes) - sizes)[classes[order]]
    return np.asarray(rank // (sizes // steps)[classes])


def over_columns(scores: Array, classes: Ids, steps: int, policy: str) -> Array:
    """Scores [units] of a group with several rows under a grid's policy: units of a column get the same score.

    Args:
        policy: ``sum`` or ``average`` over the column; ``count``: every row for itself, the scores as they are.
    """
    if policy not in ("sum", "average") or not (classes != classes[0]).any():
        return scores
    column = columns(classes, steps)
    total = np.bincount(column, weights=scores).astype(np.float64)
    if policy == "average":
        total /= np.bincount(column)
    return np.asarray(total[column])
