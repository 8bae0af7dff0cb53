"""Everything that a least-squares problem needs to know of its data: sums of products, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpstrf

Real = NDArray[np.float64]
# Multiply-adds up to which products are made in float64; beyond, in float32 over short runs of rows.
_DOUBLE = 10**10
_RUN = 2048
# Columns and parts to count directions of; spread, as a share, of a column that does not vary; and share of a column's
# variance that others leave unsaid, below which it says nothing of its own (float32 data leave about 1e-13).
_COLUMNS, _PARTS, _DEAD, _SAME = 1024, 16, 1e-6, 1e-9


@dataclass(slots=True)
class Sums:
    """Sums over rows of data X [parts, rows, n] and targets Y [parts, rows, o].

    Attributes:
        rows: how many. x: sum of X, [parts, n]. y: sum of Y, [parts, o].
        xx: X^T X, [parts, n, n]. xy: X^T Y, [parts, n, o]. yy: sum of squares of Y, [parts, o].
    """

    rows: int
    x: Real
    y: Real
    xx: Real
    xy: Real
    yy: Real

    @classmethod
    def of(cls, data: NDArray[Any], target: NDArray[Any]) -> Sums:
        """The sums of one batch."""
        parts, rows, n = data.shape
        double = parts * rows * n * (n + target.shape[-1]) <= _DOUBLE
        xx, xy = _products(data, target, double)
        y: Real = target.astype(np.float64)
        x: Real = np.sum(data, axis=1, dtype=np.float64)
        return cls(rows, x, y.sum(axis=1), xx, xy, np.square(y).sum(axis=1))

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.rows + other.rows,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    def add(self, other: Sums) -> None:
        """Take in another batch, in place."""
        self.rows += other.rows
        for mine, theirs in ((self.x, other.x), (self.y, other.y), (self.yy, other.yy)):
            mine += theirs
        self.xx += other.xx
        self.xy += other.xy

    @property
    def scale(self) -> float:
        """What errors are shares of: the target's sum of squares about its mean; about 0 where it does not vary."""
        variance = float(np.maximum(self.yy - np.square(self.y) / max(self.rows, 1), 0.0).sum())
        return variance if variance > 0 else max(float(self.yy.sum()), 1e-30)

    def directions(self) -> int:
        """Rank of the data about their mean, averaged over parts: columns that others say are not counted.

        Of more than 1024 columns as many are looked at, and the rank is scaled; likewise of more than 16 parts.
        """
        parts, n = self.x.shape
        some = slice(None, None, -(-n // _COLUMNS))
        ranks = []
        for part in range(0, parts, -(-parts // _PARTS)):
            mean = self.x[part, some] / max(self.rows, 1)
            power = np.diagonal(self.xx[part, some, some])
            gram = self.xx[part, some, some] - self.rows * np.outer(mean, mean)
            spread = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
            alive = spread > _DEAD * np.sqrt(max(float(power.max(initial=0.0)), 1e-300))
            scaled = gram[np.ix_(alive, alive)] / np.outer(spread[alive], spread[alive])
            ranks.append(float(dpstrf(scaled, tol=_SAME)[2]) / len(mean) if alive.any() else 0.0)
        return int(n * float(np.mean(ranks)) + 0.5)

    def error(self, matrix: Real, bias: Real) -> Real:
        """Sum of squares of X W + b - Y per output, [parts, o]; never negative.

        Args:
            matrix: W [parts, n, o]. bias: b [parts, o].
        """
        fitted = np.einsum("pno,pno->po", matrix, self.xx @ matrix - 2.0 * self.xy)
        mean = np.einsum("pn,pno->po", self.x, matrix)
        total = self.yy + fitted + 2.0 * bias * (mean - self.y) + self.rows * np.square(bias)
        return np.asarray(np.maximum(total, 0.0))


def _products(data: NDArray[Any], target: NDArray[Any], double: bool) -> tuple[Real, Real]:
    if double:
        wide = data.astype(np.float64)
        return _turned(wide, wide), _turned(wide, target.astype(np.float64))
    parts, rows, n = data.shape
    xx, xy = np.zeros((parts, n, n)), np.zeros((parts, n, target.shape[-1]))
    for start in range(0, rows, _RUN):
        x = np.ascontiguousarray(data[:, start : start + _RUN], np.float32)
        xx += _turned(x, x)
        xy += _turned(x, target[:, start : start + _RUN].astype(np.float32))
    return xx, xy


def _turned(left: NDArray[Any], right: NDArray[Any]) -> Real:
    """X^T Y for every part."""
    product: NDArray[Any] = np.matmul(left.transpose(0, 2, 1), right)
    return product.astype(np.float64, copy=False)
