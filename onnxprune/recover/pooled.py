"""The repair of a layer that only a mean over positions reads: it is the mean that has to be right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.recover.problem import Problem, Rows, fit
from onnxprune.recover.solve import WORTH, Solution
from onnxprune.recover.sums import Real

Array = NDArray[Any]

# Ridges that are tried, as shares of what a sample's mean row measures; small ones follow few samples too closely.
_RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0)
# Gauss-Newton steps.
_STEPS = 2
# Bytes of mean rows, one per sample and output, to hold at a time.
_BLOCK = 128 << 20
# Rows per sample up to which all of them are looked at, and bytes of them.
_MOST = 1024
_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class _Means:
    """All rows of some samples: rows of one part, and how many positions each sample has."""

    rows: Rows
    positions: int

    def apart(self, weights: Real, bias: Real) -> tuple[Array, Array]:
        """Mean over positions of what is left of the activations, [samples, o], and where they let pass, [rows, o]."""
        fitted = fit(self.rows.data, weights, bias)
        left = self.rows.clipped(self.rows.target) - self.rows.clipped(fitted)
        passed = np.ones(fitted.shape, bool)
        for flat in self.rows.flats:
            passed &= ~flat.reached(fitted)
        samples = left.shape[1] // self.positions
        return left[0].reshape(samples, self.positions, -1).mean(axis=1), passed[0]


def sharpen(problem: Problem, solution: Solution, *, fixed_bias: bool = False) -> Solution:
    """The solution, moved so that means over positions of the activation behind it come closer to what they were.

    Steps of Gauss-Newton on sum_i |mean_p r(Y_ip) - mean_p r(X_ip W + b)|^2 over samples i, with a ridge towards
    ``solution``, r the activation that the layer is aimed through. Errors of single positions matter no more where only
    their mean is read, and a small error that all positions share matters much. A solution is returned only if its
    held-out error falls.

    Args:
        problem: of one part; its tail ends in front of a mean. solution: weights [1, n, o], bias [1, o].
        fixed_bias: the bias has to stay 0.
    """
    train, held = list(_means(problem, False)), list(_means(problem, True))
    if not train or not held:
        return solution
    first = best = _error(held, solution.matrix, solution.bias)
    found, limit = solution, first * (1.0 - WORTH)
    for ridge in _RIDGES:
        weights, bias = solution.matrix, solution.bias
        for step in range(1, _STEPS + 1):
            weights, bias = _step(train, weights, bias, ridge, fixed_bias)
            error = _error(held, weights, bias)
            if error >= min(best, limit):
                break
            best, how = error, f"{solution.how}, mean {ridge:g} x {step}"
            found = replace(solution, matrix=weights, bias=bias, how=how)
    return found


def _means(problem: Problem, held: bool) -> Iterator[_Means]:
    """All rows, batch by batch; none where there are too many."""
    for rows, samples in problem.every_row(held, _MOST, _BYTES):
        yield _Means(rows, rows.data.shape[1] // samples)


def _error(parts: list[_Means], weights: Real, bias: Real) -> float:
    return float(sum(np.square(p.apart(weights, bias)[0], dtype=np.float64).sum() for p in parts))


def _step(parts: list[_Means], weights: Real, bias: Real, ridge: float, fixed_bias: bool) -> tuple[Real, Real]:
    """W + D, D_o = J_o^T (J_o J_o^T + r m I)^-1 e_o, for every output o: J_o the mean over positions of the rows that
    its activation lets pass, [samples, n], e_o what is left of the means, m the mean square of J_o's rows."""
    samples = sum(p.rows.data.shape[1] // p.positions for p in parts)
    n, outputs = weights.shape[1:]
    left, passed = zip(*(p.apart(weights, bias) for p in parts), strict=True)
    errors = np.concatenate(left).astype(np.float64)
    new, shifted = weights.copy(), bias.copy()
    some = max(1, _BLOCK // (8 * samples * (n + samples)))
    for start in range(0, outputs, some):
        at = slice(start, start + some)
        rows = np.concatenate(
            [_rows(p, mask[:, at], fixed_bias) for p, mask in zip(parts, passed, strict=True)], axis=1
        )
        products = rows @ rows.transpose(0, 2, 1)
        power = np.einsum("oii->o", products) / samples
        products += (ridge * power + (power <= 0))[:, None, None] * np.eye(samples)
        change = np.einsum("osn,os->no", rows, np.linalg.solve(products, errors[:, at].T[:, :, None])[:, :, 0])
        new[0, :, at] += change[:n]
        if not fixed_bias:
            shifted[0, at] += change[n]
    return new, shifted


def _rows(part: _Means, passed: Array, fixed_bias: bool) -> Real:
    """J of one batch, [o, samples, n], and a last column of means of ones for the bias."""
    count = part.positions
    data = part.rows.data[0].reshape(-1, count, part.rows.data.shape[2])
    mask = passed.reshape(len(data), count, -1).astype(data.dtype)
    means: Real = (np.matmul(mask.transpose(0, 2, 1), data) / count).transpose(1, 0, 2).astype(np.float64)
    if fixed_bias:
        return means
    return np.concatenate([means, mask.mean(axis=1, dtype=np.float64).T[:, :, None]], axis=2)
