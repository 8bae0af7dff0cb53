"""How many singular values of a matrix are more than noise, in closed form."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from onnxprune.decompose.factor import Array, Real


def vbmf_rank(energies: Array, long: int, total: float | None = None) -> int:
    """Rank of the empirical variational Bayes solution of matrix factorization.

    With aspect a = short / long, the noise variance v is the minimiser of the free energy, and the values above
    sqrt(long v (1 + t)(1 + a / t)), t = 2.5129 sqrt(a), stay. Nakajima, Sugiyama, Babacan and Tomioka, Global Analytic
    Solution of Fully-observed Variational Bayesian Matrix Factorization, JMLR 2013, Theorem 2 and Corollary 4.

    Args:
        energies: squared singular values of the matrix, falling, [short]. long: its longer side.
        total: sum of squares of its entries, where ``energies`` are not all of them.

    Returns:
        0 (all is noise) to the number of values above rounding.
    """
    short = len(energies)
    values = np.asarray(energies, np.float64)
    total = float(values.sum()) if total is None else total
    known = int(np.count_nonzero(values > 1e-12 * max(float(values.max(initial=0.0)), 1e-300)))
    if not known or total <= 0:
        return 0
    aspect = short / max(long, short)
    long = max(long, short)
    tau = 2.5129 * np.sqrt(aspect)
    edge = (1.0 + tau) * (1.0 + aspect / tau)
    # No more components than this can be told from noise.
    most = min(int(np.ceil(short / (1.0 + aspect))) - 1, known)
    tail = values[most:]
    low = max(float(tail.mean()) / long if tail.size else 0.0, float(values[min(most, short - 1)]) / (long * edge))
    high = total / (short * long)
    if low <= 0 or low >= high:
        noise = max(high if low >= high else low, 1e-300) if low > 0 else 1e-300
    else:
        bounds = (np.log(low), np.log(high))
        found = minimize_scalar(
            lambda x: _free_energy(values, float(np.exp(x)), long, aspect, edge), bounds=bounds, method="bounded"
        )
        noise = float(np.exp(found.x))
    return min(int(np.count_nonzero(values > long * noise * edge)), known)


def _free_energy(values: Real, noise: float, long: int, aspect: float, edge: float) -> float:
    """The free energy of noise variance ``noise``, but for constants: sum of psi over all values."""
    x = values / (long * noise)
    x = np.maximum(x, 1e-300)
    signal = x[x > edge]
    cost = float((x[x <= edge] - np.log(x[x <= edge])).sum())
    b = signal - (1.0 + aspect)
    tau = 0.5 * (b + np.sqrt(np.maximum(b * b - 4.0 * aspect, 0.0)))
    cost += float((signal - tau + np.log((tau + 1.0) / signal) + aspect * np.log(tau / aspect + 1.0)).sum())
    return cost


def calibrated(rank: int, full: int, ratio: float) -> int:
    """A rank moved towards the full one (``ratio`` up to 1) or towards none (down to -1), as NetsPresso does.

    Remaining + removed x ratio for ratio > 0, remaining + remaining x ratio below; from 1 to ``full``.
    """
    moved = rank + ratio * ((full - rank) if ratio > 0 else rank)
    return int(np.clip(round(moved), 1, full))
