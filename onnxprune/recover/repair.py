"""The repair of one layer: a linear fit, then one that knows where the activation behind it is flat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError

from onnxprune.recover.pooled import sharpen
from onnxprune.recover.problem import Problem, Rows, fit, loss
from onnxprune.recover.solve import NOTHING, RIDGES, WORTH, Solution, least_squares, solve
from onnxprune.recover.sums import Real, Sums

Stores = Callable[[Real, Real], tuple[Real, Real]]
"""(matrix, bias) -> what the layer has once they are written."""
# Rounds of refitting where an activation is flat; each lowers the error, the first most.
_ROUNDS = 3
# Ridges that are tried below the smallest where that one is the best.
_FINER = (1e-8, 1e-10)


def repair(
    problem: Problem,
    matrix: Real,
    bias: Real,
    *,
    mode: str = "full",
    fixed_bias: bool = False,
    as_stored: Stores | None = None,
) -> Solution:
    """New weights for the layer of ``problem``, or those there are where nothing is better on held-out data.

    Args:
        problem: its rows. matrix, bias: the weights there are, [parts, n, o] and [parts, o].
        mode: see :func:`solve`; ``full`` also counts errors only where they pass the activation behind the layer:
            |r(Y) - r(X W + b)|^2, by refitting to targets that follow the fit on the flat side. Zhang et al.,
            Efficient and Accurate Approximations of Nonlinear Convolutional Networks, CVPR 2015, section 3.2.
        fixed_bias: the bias has to stay 0. as_stored: what becomes of weights when they are written as codes.
    """
    found = _pointwise(problem, matrix, bias, mode, fixed_bias)
    if mode == "full" and problem.aim.tail.pooled and matrix.shape[0] == 1 and found.before > NOTHING:
        found = sharpen(problem, found, fixed_bias=fixed_bias)
    return found if as_stored is None else _rounded(problem, matrix, bias, found, as_stored)


def _rounded(problem: Problem, matrix: Real, bias: Real, found: Solution, as_stored: Stores) -> Solution:
    """The solution as it is stored, where that is still better than the weights there are."""
    fitted, shifted = as_stored(found.matrix, found.bias)
    if fitted is found.matrix or found.how == "kept":
        return found
    before = loss(problem.rows(True), matrix, bias)
    after = loss(problem.rows(True), fitted, shifted)
    if after >= before * (1.0 - WORTH):
        return Solution(matrix, bias, found.before, found.before, "kept")
    # Rounding is told as a share of what the fit was judged by, which need not be these rows' sum of squares.
    unrounded = loss(problem.rows(True), found.matrix, found.bias)
    worse = found.after * after / unrounded if unrounded > 0 else found.after
    return Solution(fitted, shifted, found.before, worse, f"{found.how}, rounded", found.ridge)


def _pointwise(problem: Problem, matrix: Real, bias: Real, mode: str, fixed_bias: bool) -> Solution:
    """The repair that looks at every row for itself."""
    train, held = problem.sums(False), problem.sums(True)
    linear = solve(train, held, matrix, bias, mode=mode, fixed_bias=fixed_bias)
    linear = _finer(train, held, matrix, bias, linear, fixed_bias)
    if mode != "full" or not problem.aim.tail.flats or linear.ridge is None:
        return linear
    found = _rounds(problem, train, matrix, bias, linear.ridge, fixed_bias)
    if not found.number:
        return linear
    how = f"{linear.how}, {found.number} rounds"
    return Solution(found.matrix, found.bias, found.before / held.scale, found.after / held.scale, how, linear.ridge)


def _finer(train: Sums, held: Sums, matrix: Real, bias: Real, found: Solution, fixed_bias: bool) -> Solution:
    """The solution, or one with a smaller ridge where the smallest that was tried is the best so far.

    Where others say exactly what was removed, the ridge is all that is left of the error.
    """
    if found.ridge != RIDGES[0]:
        return found
    for ridge in _FINER:
        try:
            fitted, shifted = least_squares(train, matrix, bias, ridge, fixed_bias)
            error = float(held.error(fitted, shifted).sum()) / held.scale
            if error >= found.after * (1.0 - WORTH):
                break
        except LinAlgError:
            break
        found = Solution(fitted, shifted, found.before, error, f"lstsq {ridge:g}", ridge)
    return found


@dataclass(frozen=True, slots=True)
class _Found:
    """Weights of the round that errs least, its number, and the held-out errors without any repair and with it."""

    matrix: Real
    bias: Real
    number: int
    before: float
    after: float


def _rounds(problem: Problem, train: Sums, matrix: Real, bias: Real, ridge: float, fixed_bias: bool) -> _Found:
    """Round after round on the rows that are not held out, as long as the error on those that are falls."""
    before = loss(problem.rows(True), matrix, bias)
    w, b = least_squares(train, matrix, bias, ridge, fixed_bias)
    found = _Found(w, b, 0, before, min(before, loss(problem.rows(True), w, b)) * (1.0 - WORTH))
    for number in range(1, _ROUNDS + 1):
        w, b = _round(problem.rows(False), train, w, b, matrix, bias, ridge, fixed_bias)
        error = loss(problem.rows(True), w, b)
        if error >= found.after:
            break
        found = _Found(w, b, number, before, error)
    return found


def _round(
    rows: Iterator[Rows], sums: Sums, w: Real, b: Real, matrix: Real, bias: Real, ridge: float, fixed_bias: bool
) -> tuple[Real, Real]:
    """Fit again to targets that follow the last fit where the activation is flat."""
    xy, y = np.zeros_like(sums.xy), np.zeros_like(sums.y)
    for batch in rows:
        wanted = batch.wanted(fit(batch.data, w, b))
        xy += np.matmul(batch.data.transpose(0, 2, 1), wanted.astype(batch.data.dtype))
        y += wanted.sum(axis=1, dtype=np.float64)
    return least_squares(Sums(sums.rows, sums.x, y, sums.xx, xy, sums.yy), matrix, bias, ridge, fixed_bias)
