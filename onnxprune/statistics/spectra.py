"""Singular values of feature maps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.statistics.means import Means
from onnxprune.statistics.registry import register

PIECE = 1 << 22
"""Elements in float64 at a time."""

CLOSE = 5e-7
"""Relative error of a nuclear norm from which the slower decomposition is worth its time."""


@register("nuclear")
class Nuclear(Means):
    """``nuclear`` [channels]: sum of singular values of a channel's maps in a batch, a matrix [samples, positions].

    Mean over batches, weighted by their samples: sum_b n_b ||X_cb||_* / sum_b n_b. The value grows with the size of a
    batch, so compare only what was measured in batches of one size.
    Yeom et al., Toward Compact Deep Neural Networks via Energy-Aware Pruning, 2021.
    """

    def measure(self, maps: NDArray[Any]) -> tuple[int, dict[str, NDArray[np.float64]]]:
        """Nuclear norms times samples; weighs the samples."""
        samples, channels = maps.shape[:2]
        norms = np.empty(channels)
        step = max(1, PIECE * channels // maps.size)
        for start in range(0, channels, step):
            some = np.moveaxis(maps[:, start : start + step], 1, 0).astype(np.float64, order="C")
            norms[start : start + step] = nuclear_norms(some.reshape(*some.shape[:2], -1))
        return samples, {"nuclear": norms * samples}


@register("rank")
class Rank(Means):
    """``rank`` [channels]: mean over samples of the rank of a channel's map [height, width].

    Maps of volumes are matrices [depth, height * width]; maps with fewer than two axes of space have no rank, and no
    result. A singular value counts above ``max(shape) * eps * largest``, eps of the maps' own type: what rounding to
    float32 left does not count. Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020.
    """

    additive = True

    def measure(self, maps: NDArray[Any]) -> tuple[int, dict[str, NDArray[np.float64]]]:
        """Ranks summed over samples; weighs the samples."""
        samples, channels, *space = maps.shape
        if len(space) < 2:
            return 0, {}
        matrices = maps.reshape(samples * channels, space[0], -1)
        ranks = np.zeros(samples * channels)
        step = max(1, PIECE * ranks.size // maps.size)
        for start in range(0, ranks.size, step):
            piece = matrices[start : start + step]
            # After a ReLU many maps are 0 throughout.
            alive = piece.any(axis=(1, 2))
            ranks[start : start + step][alive] = _ranks(piece[alive])
        return samples, {"rank": ranks.reshape(samples, channels).sum(axis=0)}


def nuclear_norms(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of singular values of float64 matrices [count, rows, columns], [count], to a relative error below 1e-6."""
    squares = np.maximum(_squared_singular_values(matrices), 0.0)
    values = np.sqrt(squares)
    norms: NDArray[np.float64] = values.sum(axis=1)
    # A root magnifies what rounding left of the small eigenvalues; only matrices of very low rank suffer from it.
    noise = np.finfo(np.float64).eps * squares[:, -1:]
    error = (noise / np.maximum(np.maximum(values, np.sqrt(noise)), np.finfo(np.float64).tiny)).sum(axis=1)
    doubtful = error > CLOSE * norms
    if doubtful.any():
        norms[doubtful] = np.linalg.svd(matrices[doubtful], compute_uv=False).sum(axis=1)
    return norms


def _ranks(matrices: NDArray[Any]) -> NDArray[np.int64]:
    limit = max(matrices.shape[1:]) * np.finfo(matrices.dtype).eps
    if matrices.dtype == np.float64:
        values = np.linalg.svd(matrices, compute_uv=False)
        return np.asarray((values > limit * values[:, :1]).sum(axis=1))
    # The limit of float32, squared, is well above the rounding of float64: eigenvalues of the smaller Gram will do.
    squares = _squared_singular_values(matrices.astype(np.float64))
    return np.asarray((squares > limit**2 * squares[:, -1:]).sum(axis=1))


def _squared_singular_values(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Eigenvalues, ascending, of the Gram matrix of the smaller side: many times faster than a decomposition."""
    turned = matrices.swapaxes(1, 2)
    small = matrices @ turned if matrices.shape[1] <= matrices.shape[2] else turned @ matrices
    return np.asarray(np.linalg.eigvalsh(small))
