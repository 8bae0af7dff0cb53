"""Weights for one contraction: ridge regression around the weights there are, judged on data that was held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from onnxprune.recover.sums import Real, Sums

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares of the Gram matrix' mean diagonal that are tried as ridge."""
# A repair has to lower the held-out error by this share, or the weights stay as they are.
WORTH = 1e-3
NOTHING = 1e-11
"""Error (share of the target's variance) that is rounding and not worth a repair."""

Fit = Callable[[Sums, Real, Real], "tuple[Real, Real]"]
"""(sums, weights, bias) -> better weights and bias."""


@dataclass(frozen=True, slots=True)
class Solution:
    """New weights of one contraction.

    Attributes:
        matrix: W [parts, n, o]. bias: b [parts, o].
        before, after: held-out error as a share of the target's variance. how: what was chosen, ``kept`` where nothing
            was better than the weights there are. ridge: of a least-squares fit.
    """

    matrix: Real
    bias: Real
    before: float
    after: float
    how: str
    ridge: float | None = None


def solve(
    train: Sums, held: Sums, matrix: Real, bias: Real, *, mode: str = "full", fixed_bias: bool = False
) -> Solution:
    """The candidate of ``mode`` that errs least on ``held``.

    It is not fitted again to ``held``: the layers behind would then see inputs there that are better than those of
    any other sample, and believe their own repair too easily.

    Candidates: new biases; a new scale and bias per output; W + D with D = argmin |Y - X (W + D) - b|^2 + r |D|^2 for
    several r, biases free. He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section
    3.2, with a ridge towards the weights there are, so that few samples change little.

    Args:
        train, held: sums over disjoint samples. matrix, bias: the weights there are.
        mode: ``bias``, ``bn``, ``lstsq`` or ``full`` (all of them). fixed_bias: the bias has to stay 0.
    """
    scale = held.scale
    before = float(held.error(matrix, bias).sum()) / scale
    if before <= NOTHING:
        return Solution(matrix, bias, before, before, "kept")
    limit, chosen = before * (1.0 - WORTH), Solution(matrix, bias, before, before, "kept")
    for candidate in candidates(mode, fixed_bias):
        try:
            fitted, shifted = candidate.fit(train, matrix, bias)
        except LinAlgError:
            continue
        error = float(held.error(fitted, shifted).sum()) / scale
        if error < limit:
            limit, chosen = error, Solution(fitted, shifted, before, error, candidate.name, candidate.ridge)
    return chosen


class Candidate(NamedTuple):
    """One way to fit; ``ridge`` where it is least squares."""

    name: str
    fit: Fit
    ridge: float | None = None


def candidates(mode: str, fixed_bias: bool = False) -> Iterator[Candidate]:
    """What a mode tries."""
    if mode in ("bias", "full") and not fixed_bias:
        yield Candidate("bias", shift)
    if mode in ("bn", "full"):
        yield Candidate("affine", lambda sums, w, b: affine(sums, w, b, fixed_bias))
    if mode in ("lstsq", "full"):
        for ridge in RIDGES:
            yield Candidate(f"lstsq {ridge:g}", _ridge(ridge, fixed_bias), ridge)


def _ridge(ridge: float, fixed_bias: bool) -> Fit:
    return lambda sums, w, b: least_squares(sums, w, b, ridge, fixed_bias)


def shift(sums: Sums, matrix: Real, bias: Real) -> tuple[Real, Real]:
    """Biases under which the mean error is 0: E[y] - E[x] W. An et al., FLAP, AAAI 2024, section 3.3."""
    return matrix, (sums.y - np.einsum("pn,pno->po", sums.x, matrix)) / sums.rows


def affine(sums: Sums, matrix: Real, bias: Real, fixed_bias: bool = False) -> tuple[Real, Real]:
    """A scale and bias per output: what new BatchNorm statistics do, where BatchNorm was folded as well."""
    xx, xy = (
        (sums.xx, sums.xy)
        if fixed_bias
        else (_centred(sums.xx, sums.x, sums.x, sums.rows), _centred(sums.xy, sums.x, sums.y, sums.rows))
    )
    power = np.einsum("pno,pno->po", matrix, xx @ matrix)
    along = np.einsum("pno,pno->po", matrix, xy)
    gain = np.where(power > 1e-12 * np.maximum(sums.yy, 1e-30), along / np.where(power > 0, power, 1.0), 1.0)
    scaled = matrix * gain[:, None, :]
    return (scaled, bias) if fixed_bias else shift(sums, scaled, bias)


def least_squares(sums: Sums, matrix: Real, bias: Real, ridge: float, fixed_bias: bool = False) -> tuple[Real, Real]:
    """W + (G + r m I)^-1 X^T (Y - X W), G and the residual centred, m the mean diagonal of G."""
    if fixed_bias:
        gram, cross = sums.xx, sums.xy
    else:
        gram = _centred(sums.xx, sums.x, sums.x, sums.rows)
        cross = _centred(sums.xy, sums.x, sums.y, sums.rows)
    change = solve_ridge(gram, cross - gram @ matrix, ridge)
    fitted = matrix + change
    return (fitted, bias) if fixed_bias else shift(sums, fitted, bias)


def solve_ridge(gram: Real, cross: Real, ridge: float) -> Real:
    """(G + r m I)^-1 C for every part; m is the mean of G's diagonal over all parts. Raises LinAlgError."""
    parts, n, _ = gram.shape
    mean = float(np.einsum("pii->", gram)) / (parts * n)
    step = ridge * mean if mean > 0 else 1.0
    if n <= 32:
        return np.asarray(np.linalg.solve(gram + step * np.eye(n), cross))
    result = np.empty_like(cross)
    for i in range(parts):
        damped = gram[i].copy()
        damped.flat[:: n + 1] += step
        result[i] = cho_solve(cho_factor(damped, overwrite_a=True, check_finite=False), cross[i], check_finite=False)
    return result


def _centred(product: Real, left: Real, right: Real, rows: int) -> Real:
    """Sum of products about the means."""
    return product - left[:, :, None] * right[:, None, :] / max(rows, 1)


def modes() -> Sequence[str]:
    """Names of the ways to fit."""
    return ("bias", "bn", "lstsq", "full")
