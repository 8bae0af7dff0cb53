"""The regression of one layer: sums of products, ridge regression, weights judged on the hold-out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.linalg.lapack import dpstrf

HOLD_OUT_PERIOD = 5
"""One batch in this many belongs to the hold-out."""


def is_validation(batch: int, batches: int) -> bool:
    """Return whether a batch is held out; of few batches the last is, of one none."""
    period = min(HOLD_OUT_PERIOD, batches)
    return period > 1 and batch % period == period - 1


Real = NDArray[np.float64]
Mask = NDArray[np.bool_]
# Multiply-adds up to which products are made in float64; beyond, in float32 over short runs of rows.
_DOUBLE = 10**10
_RUN = 2048
# Columns and parts used for the rank; relative spread of a constant column; and residual share of a column's variance
# below which it is a linear combination of the others (float32 data leave about 1e-13).
_COLUMNS, _PARTS, _DEAD, _SAME = 1024, 16, 1e-6, 1e-9


@dataclass(slots=True)
class Sums:
    """Sums over rows of data X [parts, rows, n] and targets Y [parts, rows, o].

    Attributes:
        rows: number of rows.
        x: sum of X, [parts, n].
        y: sum of Y, [parts, o].
        xx: X^T X, [parts, n, n].
        xy: X^T Y, [parts, n, o].
        yy: sum of squares of Y, [parts, o].
    """

    rows: int
    x: Real
    y: Real
    xx: Real
    xy: Real
    yy: Real

    @classmethod
    def of(cls, data: NDArray[Any], target: NDArray[Any]) -> Sums:
        """Compute the sums of one batch."""
        parts, rows, n = data.shape
        wide: Real = target.astype(np.float64)
        if parts * rows * n * (n + target.shape[-1]) <= _DOUBLE:
            data = data.astype(np.float64)
            xx, xy = _turned(data, data), _turned(data, wide)
            x: Real = np.matmul(np.ones((1, rows)), data)[:, 0]  # faster than a sum along an axis in the middle
        else:
            xx, xy = _in_runs(data, target)
            x = np.sum(data, axis=1, dtype=np.float64)
        return cls(rows, x, wide.sum(axis=1), xx, xy, np.einsum("pro,pro->po", wide, wide))

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
        """Add another batch in place."""
        self.rows += other.rows
        for mine, theirs in ((self.x, other.x), (self.y, other.y), (self.yy, other.yy)):
            mine += theirs
        self.xx += other.xx
        self.xy += other.xy

    @property
    def scale(self) -> float:
        """The scale of errors: the target's sum of squares about its mean; about 0 where it does not vary."""
        return _scale(self.rows, self.y, self.yy)

    def directions(self) -> int:
        """Return the rank of the data about their mean, averaged over parts; linear combinations are not counted.

        Of more than 1024 columns or 16 parts only as many are used, and the rank is scaled.
        """
        return _directions(self.x / max(self.rows, 1), self.rows, lambda part, of: self.xx[part, of, of])

    def gram(self, fixed_bias: bool) -> Gram:
        """Return X^T X, about the means unless the bias is fixed."""
        return Dense(self.xx if fixed_bias else _centred(self.xx, self.x, self.x, self.rows))

    def cross(self, fixed_bias: bool) -> Real:
        """Return X^T Y, about the means unless the bias is fixed."""
        return self.xy if fixed_bias else _centred(self.xy, self.x, self.y, self.rows)

    def residual(self, matrix: Real, fixed_bias: bool) -> Real:
        """Return what ``gram(fixed_bias).fit`` takes of W: X^T (Y - X W), about the means unless the bias is fixed."""
        return self.cross(fixed_bias) - self.gram(fixed_bias) @ matrix

    def error(self, matrix: Real, bias: Real) -> Real:
        """Return the sum of squares of X W + b - Y per output, [parts, o]; never negative.

        Args:
            matrix: W [parts, n, o].
            bias: b [parts, o].
        """
        fitted = np.einsum("pno,pno->po", matrix, self.xx @ matrix - 2.0 * self.xy)
        mean = np.einsum("pn,pno->po", self.x, matrix)
        total = self.yy + fitted + 2.0 * bias * (mean - self.y) + self.rows * np.square(bias)
        return np.asarray(np.maximum(total, 0.0))


class FewRows:
    """Rows in place of :class:`Sums`, where they are fewer than columns: nothing of n times n.

    Args:
        data: X [parts, rows, n].
        target: Y [parts, rows, o].

    Attributes:
        rows, x, y, yy: as those of :class:`Sums`.
    """

    def __init__(self, data: NDArray[Any], target: NDArray[Any]) -> None:
        self._data: Real = data.astype(np.float64)
        self._target: Real = target.astype(np.float64)
        self.rows = data.shape[1]
        self.x: Real = self._data.sum(axis=1)
        self.y: Real = self._target.sum(axis=1)
        self.yy: Real = np.einsum("pro,pro->po", self._target, self._target)

    @property
    def scale(self) -> float:
        """The scale of errors, as that of :class:`Sums`."""
        return _scale(self.rows, self.y, self.yy)

    def directions(self) -> int:
        """Return the rank of the data, as :meth:`Sums.directions`."""
        mean = self.x / max(self.rows, 1)
        return _directions(mean, self.rows, lambda part, of: self._data[part, :, of].T @ self._data[part, :, of])

    def gram(self, fixed_bias: bool) -> Gram:
        """Return X^T X, about the means unless the bias is fixed."""
        return Thin(self._centred(self._data, fixed_bias))

    def cross(self, fixed_bias: bool) -> Real:
        """Return X^T Y, about the means unless the bias is fixed."""
        return _turned(self._centred(self._data, fixed_bias), self._centred(self._target, fixed_bias))

    def residual(self, matrix: Real, fixed_bias: bool) -> Real:
        """Return what ``gram(fixed_bias).fit`` takes of W: Y - X W, about the means unless the bias is fixed."""
        return self._centred(self._target, fixed_bias) - self._centred(self._data, fixed_bias) @ matrix

    @staticmethod
    def _centred(rows: Real, fixed_bias: bool) -> Real:
        return rows if fixed_bias else np.asarray(rows - rows.mean(axis=1, keepdims=True))

    def error(self, matrix: Real, bias: Real) -> Real:
        """Return the sum of squares of X W + b - Y per output, [parts, o]."""
        residual = self._data @ matrix
        residual += bias[:, None]
        residual -= self._target
        return np.asarray(np.einsum("pro,pro->po", residual, residual))


Moments = Sums | FewRows
"""What a regression needs to know of rows."""


def moments(blocks: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Moments:
    """Accumulate blocks of data [parts, rows, n] and target [parts, rows, o].

    Of a wide layer the rows are collected as long as they are fewer than columns: less time and memory than sums.
    """
    waiting: list[tuple[NDArray[Any], NDArray[Any]]] = []
    total: Sums | None = None
    count = 0
    for block in blocks:
        waiting.append(block)
        count += block[0].shape[1]
        if total is None and block[0].shape[2] >= _DESCENT and count < block[0].shape[2]:
            continue
        for data, target in waiting:
            one = Sums.of(data, target)
            if total is None:
                total = one
            else:
                total.add(one)
        waiting = []
    if total is not None:
        return total
    return FewRows(*(np.concatenate(arrays, axis=1) for arrays in zip(*waiting, strict=True)))


def _scale(rows: int, y: Real, yy: Real) -> float:
    variance = float(np.maximum(yy - np.square(y) / max(rows, 1), 0.0).sum())
    return variance if variance > 0 else max(float(yy.sum()), 1e-30)


def _directions(means: Real, rows: int, products: Callable[[int, slice], Real]) -> int:
    """Return the rank of data about their means; ``products`` gives X^T X of some columns of a part."""
    parts, n = means.shape
    sampled = slice(None, None, -(-n // _COLUMNS))
    ranks = []
    for part in range(0, parts, -(-parts // _PARTS)):
        mean = means[part, sampled]
        of_part = products(part, sampled)
        gram = of_part - rows * np.outer(mean, mean)
        spread = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
        alive = spread > _DEAD * np.sqrt(max(float(np.diagonal(of_part).max(initial=0.0)), 1e-300))
        scaled = gram[np.ix_(alive, alive)] / np.outer(spread[alive], spread[alive])
        ranks.append(float(dpstrf(scaled, tol=_SAME)[2]) / len(mean) if alive.any() else 0.0)
    return int(n * float(np.mean(ranks)) + 0.5)


def _in_runs(data: NDArray[Any], target: NDArray[Any]) -> tuple[Real, Real]:
    """Return X^T X and X^T Y, made in float32 over short runs of rows and added in float64."""
    parts, rows, n = data.shape
    xx, xy = np.zeros((parts, n, n)), np.zeros((parts, n, target.shape[-1]))
    for start in range(0, rows, _RUN):
        x = np.ascontiguousarray(data[:, start : start + _RUN], np.float32)
        xx += _turned(x, x)
        xy += _turned(x, target[:, start : start + _RUN].astype(np.float32))
    return xx, xy


def _turned(x: NDArray[Any], y: NDArray[Any]) -> Real:
    """Return X^T Y for every part."""
    product: NDArray[Any] = np.matmul(x.transpose(0, 2, 1), y)
    return product.astype(np.float64, copy=False)


class Dense:
    """A Gram matrix as it is, [parts, n, n]."""

    def __init__(self, gram: Real) -> None:
        self._gram = gram
        self._factored: tuple[float, list[Any]] | None = None

    def diagonal(self) -> Real:
        """Return the sums of squares of columns, [parts, n]."""
        return np.asarray(np.einsum("pii->pi", self._gram))

    def __matmul__(self, matrix: Real) -> Real:
        return np.asarray(self._gram @ matrix)

    def fit(self, residual: Real, step: float) -> Real:
        """Return (G + s I)^-1 X^T R. Raises LinAlgError where the sum has no Cholesky factor."""
        return self.solve(residual, step)

    def products(self, residual: Real) -> Real:
        """Return X^T R."""
        return residual

    def solve(self, cross: Real, step: float) -> Real:
        """Return (G + s I)^-1 C for every part. Raises LinAlgError where the sum has no Cholesky factor."""
        n = self._gram.shape[1]
        if n <= 32:
            return np.asarray(np.linalg.solve(self._gram + step * np.eye(n), cross))
        if self._factored is None or self._factored[0] != step:
            self._factored = None  # free the memory of the last one
            self._factored = step, _factors(self._gram, step)
        solved = [cho_solve(f, c, check_finite=False) for f, c in zip(self._factored[1], cross, strict=True)]
        return np.asarray(np.stack(solved))


class Thin:
    """A Gram matrix X^T X of few rows X [parts, rows, n]: solutions by way of X X^T, [parts, rows, rows]."""

    def __init__(self, rows: Real) -> None:
        self._rows = rows
        self._outer: Real = rows @ rows.transpose(0, 2, 1)
        self._factored: tuple[float, list[Any]] | None = None

    def diagonal(self) -> Real:
        """Return the sums of squares of columns, [parts, n]."""
        return np.asarray(np.einsum("prn,prn->pn", self._rows, self._rows))

    def __matmul__(self, matrix: Real) -> Real:
        return _turned(self._rows, self._rows @ matrix)

    def fit(self, residual: Real, step: float) -> Real:
        """Return (G + s I)^-1 X^T R = X^T (X X^T + s I)^-1 R. Raises LinAlgError as :meth:`Dense.fit`."""
        if self._factored is None or self._factored[0] != step:
            self._factored = None
            self._factored = step, _factors(self._outer, step)
        solved = [cho_solve(f, r, check_finite=False) for f, r in zip(self._factored[1], residual, strict=True)]
        return _turned(self._rows, np.stack(solved))

    def products(self, residual: Real) -> Real:
        """Return X^T R."""
        return _turned(self._rows, residual)

    def solve(self, cross: Real, step: float) -> Real:
        """Return (G + s I)^-1 C = (C - X^T (X X^T + s I)^-1 X C) / s. Raises LinAlgError as :meth:`Dense.fit`."""
        result = self.fit(self._rows @ cross, step)
        np.subtract(cross, result, out=result)
        result /= step
        return result


Gram = Dense | Thin


def _factors(products: Real, step: float) -> list[Any]:
    factors = []
    for product in products:
        damped = product.copy()
        damped.flat[:: len(product) + 1] += step
        factors.append(cho_factor(damped, overwrite_a=True, check_finite=False))
    return factors


RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares of the Gram matrix' mean diagonal that are tried as ridge."""
# Unknowns per output from which on ridges are tried from the middle of the grid outwards, as far as the error falls.
_DESCENT = 256
# A recovery has to lower the hold-out error by this share, or the weights stay unchanged.
WORTH = 1e-3
NOTHING = 1e-11
"""Error (share of the target's variance) that is rounding and needs no recovery."""

Fit = Callable[[Moments, Real, Real], "tuple[Real, Real]"]
"""(sums, weights, bias) -> better weights and bias."""


@dataclass(frozen=True, slots=True)
class Solution:
    """New weights of one contraction.

    Attributes:
        matrix: W [parts, n, o].
        bias: b [parts, o].
        before: hold-out error of the present weights, as a share of the target's variance.
        after: hold-out error of the new weights, as a share of the target's variance.
        how: name of the candidate, ``kept`` where no candidate was better than the present weights.
        ridge: ridge of a least-squares fit, else None.
    """

    matrix: Real
    bias: Real
    before: float
    after: float
    how: str
    ridge: float | None = None


def solve(
    train: Moments,
    hold_out: Moments,
    matrix: Real,
    bias: Real,
    *,
    mode: str = "full",
    fixed_bias: bool = False,
    regression: RidgeRegression | None = None,
    mask: Mask | None = None,
) -> Solution:
    """Return the candidate of ``mode`` with the least error on ``hold_out``.

    The candidate is not fitted again to ``hold_out``: the inputs of later layers would then be better on these samples
    than on any other, and the hold-out errors of those layers too low.

    Candidates: new biases; a new scale and bias per output; W + D with D = argmin |Y - X (W + D) - b|^2 + r |D|^2 for
    several r, biases free. He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section
    3.2, with a ridge towards the present weights, so that few samples change little.

    Args:
        train: sums over the samples to fit to.
        hold_out: sums over the hold-out samples, disjoint from those.
        matrix: present weights, [parts, n, o].
        bias: present biases, [parts, o].
        mode: ``bias``, ``bn``, ``lstsq`` or ``full`` (all of them).
        fixed_bias: whether the bias has to stay 0.
        regression: that of these weights to ``train``, None to set it up here.
        mask: weights that may change, [parts, n, o]; None: all. The others are 0.
    """
    scale = hold_out.scale
    before = float(hold_out.error(matrix, bias).sum()) / scale
    if before <= NOTHING:
        return Solution(matrix, bias, before, before, "kept")
    limit, best = before * (1.0 - WORTH), Solution(matrix, bias, before, before, "kept")

    def judge(candidate: Candidate) -> float:
        nonlocal limit, best
        try:
            fitted, shifted = candidate.fit(train, matrix, bias)
        except LinAlgError:
            return np.inf
        error = float(hold_out.error(fitted, shifted).sum()) / scale
        if error < limit:
            limit, best = error, Solution(fitted, shifted, before, error, candidate.name, candidate.ridge)
        return error

    for candidate in candidates(mode, fixed_bias):
        judge(candidate)
    if mode in ("lstsq", "full"):
        of = regression or RidgeRegression(train, matrix, bias, fixed_bias, mask)
        ridges = [Candidate(f"lstsq {r:g}", _fit_of(of, r), r) for r in RIDGES]
        if matrix.shape[1] >= _DESCENT or of.is_masked:
            _descend([partial(judge, candidate) for candidate in ridges])
        else:
            for candidate in ridges:
                judge(candidate)
    return best


def _fit_of(regression: RidgeRegression, ridge: float) -> Fit:
    return lambda *_: regression.fit(ridge)


def _descend(errors: Sequence[Callable[[], float]]) -> None:
    """Call the functions of a series from its middle outwards, as far as the errors fall: up, or else down."""
    middle = len(errors) // 2
    first = errors[middle]()
    for step in (1, -1):
        least, at = first, middle + step
        while 0 <= at < len(errors) and (error := errors[at]()) < least:
            least, at = error, at + step
        if least < first:
            return


class Candidate(NamedTuple):
    """One way to fit; ``ridge`` where it is least squares."""

    name: str
    fit: Fit
    ridge: float | None = None


def candidates(mode: str, fixed_bias: bool = False) -> Iterator[Candidate]:
    """Iterate over the candidates of a mode that are no least squares."""
    if mode in ("bias", "full") and not fixed_bias:
        yield Candidate("bias", shift)
    if mode in ("bn", "full"):
        yield Candidate("affine", lambda sums, w, b: affine(sums, w, b, fixed_bias))


def shift(sums: Moments, matrix: Real, bias: Real) -> tuple[Real, Real]:
    """Return the biases under which the mean error is 0: E[y] - E[x] W. An et al., FLAP, AAAI 2024, section 3.3."""
    return matrix, _offset(sums, matrix, sums.y)


def _offset(sums: Moments, matrix: Real, y: Real) -> Real:
    return np.asarray((y - np.einsum("pn,pno->po", sums.x, matrix)) / sums.rows)


def affine(sums: Moments, matrix: Real, bias: Real, fixed_bias: bool = False) -> tuple[Real, Real]:
    """Fit a scale and bias per output, like new BatchNorm statistics, also where BatchNorm was folded."""
    power = np.einsum("pno,pno->po", matrix, sums.gram(fixed_bias) @ matrix)
    along = np.einsum("pno,pno->po", matrix, sums.cross(fixed_bias))
    gain = np.where(power > 1e-12 * np.maximum(sums.yy, 1e-30), along / np.where(power > 0, power, 1.0), 1.0)
    scaled = matrix * gain[:, None, :]
    return (scaled, bias) if fixed_bias else shift(sums, scaled, bias)


def least_squares(sums: Moments, matrix: Real, bias: Real, ridge: float, fixed_bias: bool = False) -> tuple[Real, Real]:
    """Return W + (G + r m I)^-1 X^T (Y - X W), G and the residual centred, m the mean diagonal of G."""
    return RidgeRegression(sums, matrix, bias, fixed_bias).fit(ridge)


class RidgeRegression:
    """Ridge regressions towards the same weights: W + (G + r m I)^-1 X^T (Y - X W) for several r, or other targets Y.

    G and the residual are centred where the bias is free; m is the mean of G's diagonal over all parts.

    Args:
        sums: sums over the rows.
        matrix: W [parts, n, o].
        bias: b [parts, o].
        fixed_bias: whether the bias has to stay as it is.
        mask: weights that may change, [parts, n, o]; None: all. Each output then has unknowns of its own.
    """

    def __init__(
        self, sums: Moments, matrix: Real, bias: Real, fixed_bias: bool = False, mask: Mask | None = None
    ) -> None:
        self._sums, self._matrix, self._bias, self._fixed, self._mask = sums, matrix, bias, fixed_bias, mask
        self._gram = sums.gram(fixed_bias)
        self._residual = sums.residual(matrix, fixed_bias)
        self._mean = max(float(self._gram.diagonal().mean()), 0.0)

    @property
    def is_masked(self) -> bool:
        """Whether some weights stay as they are."""
        return self._mask is not None

    def fit(self, ridge: float, xy: Real | None = None, y: Real | None = None) -> tuple[Real, Real]:
        """Return new weights and bias.

        Args:
            ridge: r.
            xy: X^T Y of another target, [parts, n, o]; None: of the sums.
            y: its sum, [parts, o].

        Raises:
            LinAlgError: G + r m I has no Cholesky factor.
        """
        sums, gram = self._sums, self._gram
        step = ridge * self._mean if self._mean > 0 else 1.0
        cross = None
        if xy is not None and y is not None:
            cross = (xy if self._fixed else _centred(xy, sums.x, y, sums.rows)) - gram @ self._matrix
        if self._mask is not None:
            change = masked_solve(gram, gram.products(self._residual) if cross is None else cross, step, self._mask)
        else:
            change = gram.fit(self._residual, step) if cross is None else gram.solve(cross, step)
        change += self._matrix
        return (change, self._bias) if self._fixed else (change, _offset(sums, change, sums.y if y is None else y))


# Columns up to which conjugate gradients run to the end; steps for more; and the share of the residual to stop at.
_EXACT, _STEPS, _SMALL = 64, 40, 1e-7


def masked_solve(gram: Gram, cross: Real, ridge: float, mask: Mask) -> Real:
    """Return D, 0 outside of the mask, that brings tr(D^T (G + r I) D) - 2 tr(D^T C) close to its minimum.

    Every output has unknowns of its own, and so a Gram matrix of its own. Conjugate gradients within the mask serve all
    at once, by one product with G a step; from D = 0 the value never rises.

    Args:
        gram: G.
        cross: C [parts, n, o].
        ridge: r.
        mask: [parts, n, o].
    """
    scale = 1.0 / (gram.diagonal() + ridge)[:, :, None]
    solution = np.zeros_like(cross)
    residual = np.where(mask, cross, 0.0)
    direction = scaled = residual * scale
    norm = np.einsum("pno,pno->po", residual, scaled)
    first = norm.copy()
    for _ in range(_STEPS if cross.shape[1] > _EXACT else 2 * cross.shape[1]):
        if (norm <= _SMALL**2 * first).all():
            break
        product = np.where(mask, gram @ direction + ridge * direction, 0.0)
        bend = np.einsum("pno,pno->po", direction, product)
        length = np.divide(norm, bend, out=np.zeros_like(norm), where=bend > 0)[:, None]
        solution += length * direction
        residual = residual - length * product
        scaled = residual * scale
        before, norm = norm, np.einsum("pno,pno->po", residual, scaled)
        ratio = np.divide(norm, before, out=np.zeros_like(norm), where=before > 0)[:, None]
        direction = scaled + ratio * direction
    return solution


def _centred(product: Real, x_sums: Real, y_sums: Real, rows: int) -> Real:
    """Return the sums of products about the means."""
    return product - x_sums[:, :, None] * y_sums[:, None, :] / max(rows, 1)


def modes() -> Sequence[str]:
    """Return the names of the ways to fit."""
    return ("bias", "bn", "lstsq", "full")
