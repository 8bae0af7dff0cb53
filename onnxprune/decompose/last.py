"""The last factors in closed form: given what the first ones make of the data, nothing errs less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular

from onnxprune.decompose.factor import Factor, Real, features
from onnxprune.decompose.metric import Metric, root


@dataclass(frozen=True, slots=True)
class Split:
    """A matrix M [parts, n, o] = core @ out by its directions of most output energy; cut at any rank.

    Attributes:
        core: [parts, n, r]. out: [parts, r, o]. energies: of every direction, summed over parts, falling, [r].
    """

    core: Real
    out: Real
    energies: Real

    def at(self, rank: int) -> tuple[Real, Real]:
        """The best factors of that rank."""
        return self.core[..., :rank], self.out[:, :rank]


def fitted(metric: Metric, prefix: Sequence[Factor], kernel: Real) -> tuple[Real, Real | None, bool]:
    """M = argmin |X (K - T M)|^2 = (T^T G T)^-1 T^T G K for a prefix T.

    Args:
        kernel: K [parts, channels, *kernel, o].

    Returns:
        M [parts, features, *kernel left, o], and T^T G T with whether it holds per position, see ``Metric.seen``.
    """
    sizes = kernel.shape[2:-1]
    seen, alone = metric.seen(prefix, sizes)
    if not prefix:
        return kernel, seen, alone
    cross = features(prefix, metric.times(kernel))
    assert seen is not None
    # Columns of a prefix may depend on each other: the smallest solution then.
    flat = cross.reshape(len(cross), seen.shape[-1], -1)
    scale = np.einsum("pii->p", seen)[:, None, None] / seen.shape[-1]
    damped = seen + 1e-10 * np.where(scale > 0, scale, 1.0) * np.eye(seen.shape[-1])
    solved: Real = np.asarray(np.linalg.solve(damped, flat), np.float64)
    return solved.reshape(cross.shape), seen, alone


def split(matrix: Real, seen: Real | None, alone: bool) -> Split:
    """Directions of the output Y = X M by energy: eigenvectors of M^T G M, or for wide outputs of G^T/2 M M^T G^1/2.

    Reduced-rank regression; with G the identity, the singular value decomposition of M. Zhang et al., Accelerating Very
    Deep Convolutional Networks, TPAMI 2016, section 3.1; Wang et al., SVD-LLM, ICLR 2025, for the whitened form.

    Args:
        matrix: M [parts, features, *kernel left, o]. seen, alone: G, see ``Metric.seen``.
    """
    parts, outputs = len(matrix), matrix.shape[-1]
    flat = matrix.reshape(parts, -1, outputs)
    if outputs <= flat.shape[1]:
        energies, vectors = falling(flat.transpose(0, 2, 1) @ _apply(seen, matrix, alone))
        return Split(flat @ vectors, vectors.transpose(0, 2, 1), energies)
    half: Real | None = None if seen is None else root(seen)
    white = flat if half is None else _apply(half.transpose(0, 2, 1), matrix, alone)
    energies, vectors = falling(white @ white.transpose(0, 2, 1))
    core = vectors
    if half is not None:
        shaped = vectors.reshape(parts, half.shape[-1], -1)
        solved = [solve_triangular(r, v, trans="T", lower=True) for r, v in zip(half, shaped, strict=True)]
        core = np.stack(solved).reshape(vectors.shape)
    return Split(core, vectors.transpose(0, 2, 1) @ white, energies)


def _apply(gram: Real | None, matrix: Real, alone: bool) -> Real:
    """G M as [parts, n, o]; where G holds per position, for every one of them."""
    parts, outputs = len(matrix), matrix.shape[-1]
    if gram is None:
        return matrix.reshape(parts, -1, outputs)
    rows = matrix.shape[1] if alone else -1
    return np.asarray((gram @ matrix.reshape(parts, rows if alone else gram.shape[-1], -1)).reshape(parts, -1, outputs))


def falling(matrix: Real) -> tuple[Real, Real]:
    """Eigenvalues of symmetric matrices [parts, n, n] from the largest, summed over parts, and their vectors."""
    values, vectors = np.linalg.eigh((matrix + matrix.transpose(0, 2, 1)) / 2)
    return np.maximum(values[:, ::-1], 0.0).sum(axis=0), np.ascontiguousarray(vectors[..., ::-1])
