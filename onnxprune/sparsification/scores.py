"""Scores of single weights: the loss when each of them becomes 0. Arrays only.

All are energies, so that sums over blocks and shares of the whole have a meaning: the squared error of a layer's output
that a zero makes, as far as a criterion knows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.sparsification.patterns import LOCKED, Pattern, Real, lowest

CRITERIA = ("magnitude", "wanda", "obs", "gradient", "snip", "snip-momentum", "taylor")
NEEDS_DATA = CRITERIA[1:]
GRADIENTS = CRITERIA[3:]


@dataclass(frozen=True, slots=True)
class InputGram:
    """Second moments of a layer's input: mean products of its columns.

    Attributes:
        full: [parts, n, n], columns in the order of the layer's form; None where that is too large.
        per_channel: [parts, channels, channels], one for all positions of the kernel; None where there is ``full``.
        mean: mean of the columns, [parts, n] or [parts, channels].
        rows: number of rows behind them.
    """

    full: Real | None
    per_channel: Real | None
    mean: Real
    rows: int

    def power(self, taps: int) -> Real:
        """Return the mean squares of the columns, positions of the kernel innermost, [parts, n]."""
        if self.full is not None:
            return np.asarray(np.einsum("pii->pi", self.full))
        assert self.per_channel is not None
        return np.repeat(np.einsum("pii->pi", self.per_channel), taps, axis=1)

    def part(self, index: int, taps: int) -> Real:
        """Return the Gram matrix of a part [n, n]; columns at different positions of a kernel count as uncorrelated."""
        if self.full is not None:
            return np.asarray(self.full[index])
        assert self.per_channel is not None
        return np.kron(self.per_channel[index], np.eye(taps))


def magnitude(matrix: Real) -> Real:
    """w^2. Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015."""
    return np.square(matrix)


def wanda(matrix: Real, power: Real) -> Real:
    """w^2 E[x^2], the square of |w| |x|. Sun et al., A Simple and Effective Pruning Approach for LLMs, ICLR 2024."""
    return np.square(matrix) * power[:, :, None]


def obs(matrix: Real, inverse_diagonal: Real) -> Real:
    """w^2 / [H^-1]_jj, the error that is left when the others make up. Hassibi and Stork, Optimal Brain Surgeon, 1993.

    Args:
        matrix: [parts, n, o].
        inverse_diagonal: of the inverse of H, [parts, n].
    """
    return np.square(matrix) / inverse_diagonal[:, :, None]


def locked(scores: Real, matrix: Real) -> Real:
    """Return scores under which elements that are 0 already go first."""
    return np.where(matrix == 0, LOCKED, scores)


def blocks_by_energy(scores: Real, pattern: Pattern, energy: float) -> int:
    """Return the largest number of blocks whose scores add up to no more than 1 - ``energy`` of the whole."""
    blocks = np.sort(np.maximum(pattern.blocks(scores), 0.0).ravel())
    total = float(blocks.sum())
    lost = np.cumsum(blocks)
    return int(np.searchsorted(lost, (1.0 - energy) * total, side="right")) if total > 0 else 0


def blocks_globally(scores: list[Real], pattern: Pattern, ratio: float, max_share: float) -> list[int]:
    """Return for every layer how many blocks go where those of all layers compete, each by its share of its layer.

    Args:
        scores: [parts, n, o] of every layer.
        pattern: the pattern.
        ratio: share of all elements to set to 0.
        max_share: largest share of a layer.
    """
    shares = []
    for one in scores:
        blocks = pattern.blocks(one)
        total = float(np.maximum(blocks, 0.0).sum())
        shares.append(np.where(blocks == LOCKED, LOCKED, blocks / total if total > 0 else blocks).ravel())
        # The blocks that a layer has to keep come last.
        spared = len(shares[-1]) - int(max_share * len(shares[-1]))
        if spared:
            shares[-1][np.argpartition(shares[-1], -spared)[-spared:]] = np.inf
    joined = np.concatenate(shares)
    mask = lowest(joined, min(round(ratio * joined.size), int(np.isfinite(joined).sum())))
    ends = np.cumsum([len(one) for one in shares])
    return [int(part.sum()) for part in np.split(mask, ends[:-1])]
