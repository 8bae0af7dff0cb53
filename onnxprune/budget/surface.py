"""A time over two numbers of channels, from samples: what was measured where it was, a product of factors between."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Times below are the clock's resolution.
_LEAST = 2e-7
# Weight of the straight line in the logarithm against what single levels add to it, in samples.
_RIDGE = 0.3


@dataclass(frozen=True, slots=True)
class Surface:
    """log t = line + own_reads[level] + own_makes[level] + rest[pair].

    Attributes:
        reads, makes: levels, ascending. own_reads, own_makes: what each adds to the line. rest: [reads, makes], what is
            left of the measured pairs, 0 elsewhere. line: constant and slopes over the logarithms.
    """

    reads: Array
    makes: Array
    own_reads: Array
    own_makes: Array
    rest: Array
    line: Array

    def at(self, reads: NDArray[np.int64], makes: NDArray[np.int64]) -> Array:
        """Seconds [points]; between levels the logarithms of the nearest ones are joined by lines."""
        x, y = np.log(np.maximum(reads, 1)), np.log(np.maximum(makes, 1))
        value = self.line[0] + self.line[1] * x + self.line[2] * y
        value = value + np.interp(x, self.reads, self.own_reads) + np.interp(y, self.makes, self.own_makes)
        i, j = _level(self.reads, x), _level(self.makes, y)
        known = (i >= 0) & (j >= 0)
        return np.asarray(np.exp(value + np.where(known, self.rest[i, j], 0.0)))


def fit(reads: Array, makes: Array, seconds: Array) -> Surface:
    """A surface through samples [samples]: ridge regression of the logarithm on the two levels and a line.

    Kernels that take channels in blocks make steps, which levels of their own can follow. Pairs that were measured keep
    the mean of what the levels leave unexplained.
    """
    x, y, t = np.log(np.maximum(reads, 1)), np.log(np.maximum(makes, 1)), np.log(np.maximum(seconds, _LEAST))
    levels_x, i = np.unique(x, return_inverse=True)
    levels_y, j = np.unique(y, return_inverse=True)
    one = np.ones((x.size, 1))
    levels = [np.eye(levels_x.size)[i], np.eye(levels_y.size)[j]]
    design = np.hstack([one, x[:, None], y[:, None], *levels])
    penalty = np.concatenate([[1e-9, 1e-3, 1e-3], np.full(levels_x.size + levels_y.size, _RIDGE)])
    weights = np.linalg.solve(design.T @ design + np.diag(penalty), design.T @ t)
    left = t - design @ weights
    total = np.zeros((levels_x.size, levels_y.size))
    count = np.zeros_like(total)
    np.add.at(total, (i, j), left)
    np.add.at(count, (i, j), 1.0)
    rest = total / (count + 0.5)
    cut = 3 + levels_x.size
    return Surface(levels_x, levels_y, weights[3:cut], weights[cut:], rest, weights[:3])


def _level(levels: Array, values: Array) -> NDArray[np.int64]:
    """Number of the level that each value is, -1 where it is none."""
    place = np.minimum(np.searchsorted(levels, values - 1e-12), levels.size - 1)
    return np.asarray(np.where(np.abs(levels[place] - values) < 1e-9, place, -1))
