"""The repair of one layer: a linear fit, then one that knows where the activation behind it is flat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.recover.problem import Problem, Rows, fit, loss
from onnxprune.recover.solve import Solution, least_squares, solve
from onnxprune.recover.sums import Real, Sums

# Rounds of refitting where an activation is flat; each lowers the error, the first most.
_ROUNDS = 4
_WORTH = 1e-3


def repair(problem: Problem, matrix: Real, bias: Real, *, mode: str = "full", fixed_bias: bool = False) -> Solution:
    """New weights for the layer of ``problem``, or those there are where nothing is better on held-out data.

    Args:
        problem: its rows. matrix, bias: the weights there are, [parts, n, o] and [parts, o].
        mode: see :func:`solve`; ``full`` also counts errors only where they pass the activation behind the layer:
            |r(Y) - r(X W + b)|^2, by refitting to targets that follow the fit on the flat side. Zhang et al.,
            Efficient and Accurate Approximations of Nonlinear Convolutional Networks, CVPR 2015, section 3.2.
        fixed_bias: the bias has to stay 0.
    """
    train, held = problem.sums(False), problem.sums(True)
    linear = solve(train, held, matrix, bias, mode=mode, fixed_bias=fixed_bias)
    if mode != "full" or not problem.aim.tail.flats or linear.ridge is None:
        return linear
    scale = max(float((held.yy - np.square(held.y) / max(held.rows, 1)).sum()), 1e-30)
    rounds, before, after = _rounds(problem, train, matrix, bias, linear.ridge, fixed_bias)
    if not rounds:
        return linear
    fitted, shifted = _refit(problem, None, train + held, matrix, bias, linear.ridge, fixed_bias, rounds)
    return Solution(fitted, shifted, before / scale, after / scale, f"{linear.how}, {rounds} rounds", linear.ridge)


def _rounds(
    problem: Problem, train: Sums, matrix: Real, bias: Real, ridge: float, fixed_bias: bool
) -> tuple[int, float, float]:
    """How many rounds err least on held-out data; the errors without any repair and with these."""
    before = loss(problem.rows(True), matrix, bias)
    w, b = least_squares(train, matrix, bias, ridge, fixed_bias)
    best, rounds = min(before, loss(problem.rows(True), w, b)) * (1.0 - _WORTH), 0
    for number in range(1, _ROUNDS + 1):
        w, b = _round(problem.rows(False), train, w, b, matrix, bias, ridge, fixed_bias)
        error = loss(problem.rows(True), w, b)
        if error >= best:
            break
        best, rounds = error, number
    return rounds, before, best


def _refit(
    problem: Problem,
    held: bool | None,
    sums: Sums,
    matrix: Real,
    bias: Real,
    ridge: float,
    fixed_bias: bool,
    rounds: int,
) -> tuple[Real, Real]:
    w, b = least_squares(sums, matrix, bias, ridge, fixed_bias)
    for _ in range(rounds):
        w, b = _round(problem.rows(held), sums, w, b, matrix, bias, ridge, fixed_bias)
    return w, b


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
