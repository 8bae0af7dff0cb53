"""Scores that say what a unit costs at the model's outputs: a curve measured at a few cuts of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxprune.labels.label import Ids
from onnxprune.selection.scopes import in_order

Array = NDArray[np.float64]

SHARES = (0.125, 0.25, 0.5, 0.75)
"""Shares of a group to cut alone and measure."""


def counts(steps: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Numbers of steps to measure of a group that can lose up to ``steps - 1``; at least one, where it can lose any."""
    found = {min(max(round(share * steps), 1), steps - 1) for share in shares}
    return sorted(n for n in found if n > 0)


def along(values: Array, classes: Ids, steps: int, drifts: Mapping[int, float]) -> Array:
    """Scores [units] in the order of ``values``, so that those of a cut add up to its measured drift.

    Between measured counts, drift grows as the sum of ``values`` does; beyond the last as it did before that. A step
    never scores less than one that goes before it.

    Args:
        values: scores that rank the units [units], none below 0. classes: units that stand in for each other, [units].
        steps: in how many equal steps the group can be cut. drifts: {steps gone: drift}, not empty.
    """
    _, rank = in_order(values, classes)
    step = rank // (np.bincount(classes) // steps)[classes]
    # Where all scores are 0 (nothing seen), every step counts the same.
    summed = np.bincount(step, weights=values, minlength=steps)
    summed = np.maximum(summed, 1e-9 * summed.max() if summed.max() > 0 else 1.0)
    sums = np.concatenate([[0.0], np.cumsum(summed)])
    known = sorted(drifts)
    x = sums[[0, *known]]
    y = np.maximum.accumulate([0.0, *(max(drifts[n], 0.0) for n in known)])
    grown = np.interp(sums, x, y)
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    grown += slope * np.maximum(sums - x[-1], 0.0)
    each = np.maximum.accumulate(np.diff(grown)) / np.bincount(step, minlength=steps)
    # Steps that count the same still go in the order of their scores.
    each = each + 1e-9 * (each[-1] + 1e-30) * np.arange(steps)
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return np.asarray(each[step] * (1.0 + 1e-12 * order))
