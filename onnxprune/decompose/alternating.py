"""tensorly's alternating algorithms with fixed seeds, a fast SVD, and an eye on terms that run away."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorly.cp_tensor import cp_normalize, cp_to_tensor
from tensorly.decomposition import parafac, partial_tucker

from onnxprune.decompose.factor import Real

# Rounds of higher-order orthogonal iteration; the first brings nearly all of it.
_ITERATIONS = 2
# Rounds of alternating least squares, and the change in error that is not worth another.
_ROUNDS, _ENOUGH = 60, 1e-5
# Terms that together weigh so many times what they add up to cancel each other: such weights run away and overflow.
_CANCELLING = 1000.0
# Pull of every vector towards 0, for a kernel of norm 1: keeps terms from growing against each other.
_PULL = 1e-6


def orthogonal_iteration(kernel: Real, ranks: Mapping[int, int], seed: int) -> list[Real]:
    """Orthonormal bases [size, rank] of some modes of a tensor, {mode: rank}.

    Higher-order orthogonal iteration. De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21, 2000.
    """
    with np.errstate(all="ignore"):  # a kernel of zeros has no relative error
        (_, bases), _ = partial_tucker(
            kernel, list(ranks.values()), modes=list(ranks), n_iter_max=_ITERATIONS, svd=_leading, random_state=seed
        )
    return list(bases)


def least_squares(kernel: Real, rank: int, seed: int, start: str) -> tuple[list[Real], float]:
    """Unit vectors [size, rank] of every mode, and the squared error; infinite where terms cancel each other.

    Alternating least squares. Carroll and Chang, Psychometrika 35, 1970; Harshman, 1970.

    Args:
        kernel: of norm 1. start: ``svd`` or ``random``.
    """
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            terms = parafac(
                kernel, rank, n_iter_max=_ROUNDS, init=start, tol=_ENOUGH, random_state=seed, l2_reg=_PULL, svd=_leading
            )
    except np.linalg.LinAlgError:
        return [], np.inf
    found = cp_normalize(terms)
    whole = cp_to_tensor(found)
    norm, weight = float(np.vdot(whole, whole)), float(np.vdot(found.weights, found.weights))
    if not np.isfinite(norm) or weight > _CANCELLING * max(norm, 1e-300):
        return [], np.inf
    return list(found.factors), float(np.sum(np.square(kernel - whole)))


def _leading(matrix: Any, n_eigenvecs: int | None = None, **_: Any) -> tuple[Real, Real, Real]:
    """Leading singular vectors from the eigenvectors of the smaller product: far faster than an SVD, exact enough."""
    count = n_eigenvecs or min(matrix.shape)
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    left = vectors[:, ::-1][:, :count]
    values = np.sqrt(np.maximum(values[::-1][:count], 0.0))
    right = left.T @ matrix
    return left, values, right / np.where(values > 0, values, 1.0)[:, None]
