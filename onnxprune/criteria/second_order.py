"""Optimal brain surgeon on whole units: the error that is left after the best correction of all other weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from onnxprune.criteria.registry import register
from onnxprune.criteria.slot import Slot
from onnxprune.statistics.maps import Maps

DAMPING = 1e-3
"""Of the mean diagonal: far above the rounding of a Gram matrix, far below what a channel in use measures."""

PIECE = 1 << 22
"""Elements of stacked blocks at a time."""


@register("obs", needs=("gram", "square"), reads_all=True)
def obs(slot: Slot, maps: Maps) -> NDArray[Any] | None:
    """Error after the best correction, tr(W_S^T ([H^-1]_SS)^-1 W_S) of a unit S, shared by its channels. [channels].

    H = E[x x^T] + 1e-3 mean(diag) I over the columns of the contraction's input, S the columns of a unit; columns that
    are 0 on all data add nothing. Where the Gram matrix has no taps, every tap is a further output. Queries and keys
    have no weights to correct: E[q_i^2] E[k_i^2], the energy of their product.
    Hassibi & Stork, Second Order Derivatives for Network Pruning, NeurIPS 1992; by units: Kurtic et al., ZipLM,
    NeurIPS 2023.
    """
    if slot.pairs:
        if "square" not in maps:
            return None
        return np.asarray(maps["square"] * np.square(slot.blocks, dtype=np.float64).sum(axis=(0, 2)))
    if "gram" not in maps:
        return None
    gram = maps["gram"]
    parts, n, _ = gram.shape
    per_channel = parts * n // slot.units.size
    weights = slot.blocks.reshape(parts, n, -1)
    damping = DAMPING * float(np.mean(np.einsum("pii->pi", gram)))
    owner = np.repeat(slot.units.reshape(parts, -1), per_channel, axis=1)
    total = np.zeros(slot.size)
    if damping > 0:
        for part in range(parts):
            _add_part(total, gram[part], weights[part], owner[part], damping)
    return np.asarray((total / np.maximum(np.bincount(slot.units, minlength=slot.size), 1))[slot.units])


def _add_part(
    total: NDArray[np.float64],
    gram: NDArray[np.float64],
    weights: NDArray[Any],
    owner: NDArray[np.int64],
    damping: float,
) -> None:
    """Add the errors of the units of one part, gram [n, n], weights [n, outputs], owner [n]."""
    inverse = _inverse(gram, damping)
    used = np.diagonal(gram) > 0
    for units, columns in units_by_columns(owner):
        for some in _runs(units.size, columns.shape[1] * max(columns.shape[1], weights.shape[1])):
            at = columns[some]
            # Of the inverse only the lower triangle is there, and columns ascend.
            lower = np.tril(inverse[at[:, :, None], at[:, None, :]])
            block = lower + np.tril(lower, -1).swapaxes(1, 2)
            mine = weights[at] * used[at][:, :, None]
            total[units[some]] += np.einsum("kco,kco->k", mine, np.linalg.solve(block, mine.astype(np.float64)))


def _inverse(gram: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    """Lower triangle of the inverse of gram + damping * I, through Cholesky: a third of the work of a general one."""
    square = np.array(gram, dtype=np.float64, order="F")
    square.flat[:: square.shape[0] + 1] += damping
    factor, failed = lapack.dpotrf(square, lower=1, overwrite_a=1)
    if not failed:
        factor, failed = lapack.dpotri(factor, lower=1, overwrite_c=1)
    if failed:  # rounding made it indefinite: a Gram matrix that was not accumulated here, or a damping far too small
        return np.asarray(np.linalg.pinv(gram + damping * np.eye(gram.shape[0]), hermitian=True))
    return np.asarray(factor)


def units_by_columns(owner: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(units, their columns [units, count]) for every number of columns that units have."""
    order = np.argsort(owner, kind="stable")
    present, first, counts = np.unique(owner[order], return_index=True, return_counts=True)
    for count in np.unique(counts):
        these = counts == count
        yield present[these], order[first[these][:, None] + np.arange(count)]


def _runs(size: int, each: int) -> Iterator[slice]:
    """Slices of ``size`` things of ``each`` elements that keep within ``PIECE``."""
    step = max(1, PIECE // max(1, each))
    for start in range(0, size, step):
        yield slice(start, start + step)
