"""A group with its scores: the input of every allocation."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxprune.labels.label import Ids

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RankedGroup:
    """One group with the scores and counts that the allocation reads.

    Attributes:
        values: [units], the lowest are removed first; -inf for removed units, NaN where the whole row is removed.
        classes: [units], every class loses the same share.
        steps: number of equal steps in which it can be pruned.
        counts: numbers of steps that may be removed, ascending, see :func:`allowed_counts`.
        ratio: share to remove, 0 <= ratio < 1.
        is_local: whether the ratio holds for this group by itself, at any scope.
        ranking_scope: groups of equal ranking scope share a threshold.
        num_removed: number of steps that are removed already.
    """

    values: Array
    classes: Ids
    steps: int
    counts: Ids
    ratio: float
    is_local: bool = False
    ranking_scope: Hashable = None
    num_removed: int = 0

    @property
    def per_step(self) -> int:
        """Return the number of units that one step removes."""
        return self.values.size // self.steps
