"""Optimal brain surgeon one unit after the other: each removal corrects the rest before the next is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.criteria.registry import register
from onnxprune.criteria.second_order import DAMPING, obs, units_by_columns
from onnxprune.criteria.slot import Slot
from onnxprune.statistics.maps import Maps

Real = NDArray[np.float64]

# So many units of a group go one at a time; of larger groups this share goes at once.
_ROUNDS = 128


@register("ziplm", needs=("gram", "square"), reads_all=True, comparable=True)
def ziplm(slot: Slot, maps: Maps) -> NDArray[Any] | None:
    """Error that each unit adds when units go weakest first, all other weights corrected in between. [channels].

    tr(W_S^T ([H^-1]_SS)^-1 W_S) of the next unit S, then W -= H^-1_:S ([H^-1]_SS)^-1 W_S and likewise H^-1, H the
    covariance of the columns (biases are corrected too) plus 1e-3 of its mean diagonal, products of different columns
    shrunk by rows / (rows + columns), since what few rows show need not hold. A unit never counts less than one removed
    before it. Two units that say the same do not both go, as they do under ``obs``. Relative to the square root of the
    contraction's output energy, so that layers compare. Kurtic et al., ZipLM, NeurIPS 2023, section 3.1.
    """
    if slot.pairs:
        product = obs(slot, maps)
        return None if product is None else product / np.sqrt(max(float(product.sum()), 1e-300))
    if "gram" not in maps:
        return None
    gram, mean = maps["gram"], maps["column_mean"]
    parts, n, _ = gram.shape
    weights = slot.blocks.reshape(parts, n, -1).astype(np.float64)
    owner = np.repeat(slot.units.reshape(parts, -1), parts * n // slot.units.size, axis=1)
    covariance = gram - mean[:, :, None] * mean[:, None, :]
    # Seen few times, columns seem to make up for each other: what they have in common is believed less.
    believed = _belief(maps, n)
    covariance = believed * covariance + (1.0 - believed) * covariance * np.eye(n)
    energy = float(np.einsum("pno,pno->", weights, covariance @ weights))
    power = np.einsum("pii->pi", covariance)
    weights[power <= 1e-12 * power.max(initial=0.0)] = 0.0  # columns that never change are the bias' to correct
    damping, total = DAMPING * float(power.mean()), np.zeros(slot.size)
    for part in range(parts if damping > 0 else 0):
        total += eliminate(covariance[part], weights[part], owner[part], slot.size, damping)
    total /= np.sqrt(energy) if energy > 0 else 1.0
    return np.asarray((total / np.maximum(np.bincount(slot.units, minlength=slot.size), 1))[slot.units])


def _belief(maps: Maps, columns: int) -> float:
    """Share of the products of different columns that is kept: rows / (rows + columns).

    Rows of a sample lie side by side and say much the same: of so many rows of one, their root counts.
    """
    rows = float(maps["rows"]) if "rows" in maps else 0.0
    if not rows:
        return 1.0
    counted = np.sqrt(rows * min(max(maps.samples, 1), rows))
    return float(counted / (counted + columns))


def corrected(maps: Maps, weights: Real, gone: NDArray[np.bool_], *, biased: bool) -> tuple[Real, Real]:
    """Weights that make up for columns that go, W_K + (H_KK)^-1 H_KR W_R and 0, and the biases to add.

    H as in :func:`ziplm`; of the columns as they are where there is no bias to add.

    Args:
        maps: ``gram``, ``column_mean`` and ``rows`` of the contraction. weights: [parts, n, outputs].
        gone: columns that go, [parts, n]. biased: whether the contraction has biases.
    """
    gram, mean = maps["gram"], maps["column_mean"]
    parts, n, outputs = weights.shape
    result, shift = np.where(gone[:, :, None], 0.0, weights), np.zeros((parts, outputs))
    believed = _belief(maps, n)
    for part in np.flatnonzero(gone.any(axis=1)):
        lost, kept = np.flatnonzero(gone[part]), np.flatnonzero(~gone[part])
        products = gram[part] - np.outer(mean[part], mean[part]) if biased else gram[part]
        power = float(np.trace(products)) / n
        if kept.size and power > 0:
            block = believed * products[np.ix_(kept, kept)]
            block.flat[:: kept.size + 1] = np.diagonal(products)[kept] + DAMPING * power
            across = believed * products[np.ix_(kept, lost)] @ weights[part, lost]
            result[part, kept] += np.linalg.solve(block, across)
        if biased:
            shift[part] = mean[part] @ (weights[part] - result[part])
    return result, shift


def eliminate(covariance: Real, weights: Real, owner: NDArray[np.int64], size: int, damping: float) -> Real:
    """Errors [size] that units add in the order in which they go.

    Args:
        covariance: [n, n]. weights: [n, outputs]. owner: unit of every column, [n].
        damping: added to the diagonal.
    """
    scores, left = np.zeros(size), list(units_by_columns(owner))
    inverse = np.asarray(np.linalg.inv(covariance + damping * np.eye(len(covariance))), np.float64)
    weights, highest = weights.copy(), 0.0
    while left:
        errors = [_errors(inverse, weights, columns) for _, columns in left]
        count = max(1, sum(u.size for u, _ in left) // _ROUNDS)
        limit = np.partition(np.concatenate(errors), count - 1)[count - 1]
        gone = [np.flatnonzero(e <= limit)[:count] for e in errors]
        columns = np.concatenate([c[g].ravel() for (_, c), g in zip(left, gone, strict=True)])
        for (units, _), own, chosen in zip(left, errors, gone, strict=True):
            scores[units[chosen]] = np.maximum(own[chosen], highest)
        highest = max(highest, float(limit))
        _remove(inverse, weights, columns)
        kept = [(np.delete(u, g), np.delete(c, g, axis=0)) for (u, c), g in zip(left, gone, strict=True)]
        left = [(u, c) for u, c in kept if u.size]
    return scores


def _errors(inverse: Real, weights: Real, columns: NDArray[np.int64]) -> Real:
    """Error that each unit [k] with columns [k, c] would add now."""
    mine = weights[columns]
    solved = np.linalg.solve(inverse[columns[:, :, None], columns[:, None, :]], mine)
    return np.asarray(np.einsum("kco,kco->k", mine, solved))


def _remove(inverse: Real, weights: Real, columns: NDArray[np.int64]) -> None:
    """Correct the other weights for columns that go, and take them out of the inverse, in place."""
    across = inverse[:, columns]
    block = inverse[np.ix_(columns, columns)]
    solved = np.linalg.solve(block, np.concatenate([weights[columns], across.T], axis=1))
    weights -= across @ solved[:, : weights.shape[1]]
    inverse -= across @ solved[:, weights.shape[1] :]
    weights[columns] = 0.0
    inverse[columns] = 0.0
    inverse[:, columns] = 0.0
