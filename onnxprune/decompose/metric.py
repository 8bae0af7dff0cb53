"""What an error in a kernel's weights costs at the layer's output: the second moments of what the layer reads."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from onnxprune.decompose.factor import Array, Factor, Real, compose, features

RIDGE = 1e-3
"""Share of the mean diagonal added to second moments: what the data never show has to stay roughly right too."""


class Metric:
    """Errors D [parts, n, o] count as trace(D^T G D), n = channels x positions of the kernel, positions innermost.

    G is the mean of X^T X over rows of the layer's columns X, given in full; or per channel, shared by the positions of
    the kernel; or the identity, where there are no data. A ridge is added to what is given.

    Args:
        full: [parts, n, n]. shared: [parts, channels, channels]. Neither: the identity.
    """

    def __init__(self, full: Array | None = None, shared: Array | None = None) -> None:
        self.full = None if full is None else ridged(full)
        self.shared = None if shared is None else ridged(shared)

    @property
    def plain(self) -> bool:
        """Whether no data are behind it."""
        return self.full is None and self.shared is None

    def times(self, kernel: Array) -> Real:
        """G A for A [parts, channels, *kernel, m]."""
        if self.full is not None:
            return np.asarray((self.full @ kernel.reshape(*self.full.shape[:2], -1)).reshape(kernel.shape))
        if self.shared is not None:
            return np.asarray((self.shared @ kernel.reshape(*self.shared.shape[:2], -1)).reshape(kernel.shape))
        return np.asarray(kernel, np.float64)

    def energy(self, kernel: Array) -> float:
        """trace(A^T G A)."""
        return float(np.vdot(kernel, self.times(kernel)))

    def error(self, kernel: Array, other: Array) -> float:
        """Energy of the difference as a share of the energy of ``kernel``; 0 for a kernel of zeros."""
        whole = self.energy(kernel)
        return max(self.energy(kernel - other), 0.0) / whole if whole > 0 else 0.0

    def channels(self, kernel: Sequence[int]) -> Real | None:
        """Second moments of the channels, mean over the positions of the kernel; None for the identity."""
        return self.along(kernel, ())

    def along(self, kernel: Sequence[int], axes: Sequence[int]) -> Real | None:
        """Second moments of channels x the kernel's positions along some axes, mean over its other axes.

        Args:
            kernel: sizes of the kernel. axes: which of them stay.

        Returns:
            [parts, m, m], m = channels x sizes along ``axes``; None for the identity.
        """
        kept = prod(kernel[a] for a in axes)
        if self.shared is not None:
            return np.asarray(np.kron(self.shared, np.eye(kept)))
        if self.full is None:
            return None
        rank, parts = len(kernel), len(self.full)
        whole = self.full.reshape(parts, -1, *kernel, self.full.shape[1] // prod(kernel), *kernel)
        letters = iter("defghijklmnopqrs")
        first = [next(letters) for _ in range(rank)]
        second = [next(letters) if a in axes else first[a] for a in range(rank)]
        out = [*(first[a] for a in axes)], [*(second[a] for a in axes)]
        terms = f"xa{''.join(first)}b{''.join(second)}->xa{''.join(out[0])}b{''.join(out[1])}"
        mean = np.einsum(terms, whole) / (prod(kernel) / kept)
        side = mean.shape[1] * kept
        return np.asarray(mean.reshape(parts, side, side))

    def seen(self, prefix: Sequence[Factor], kernel: Sequence[int]) -> tuple[Real | None, bool]:
        """T^T G T for a prefix T, and whether it holds for every position of the kernel that is left, on its own.

        Returns:
            [parts, f, f] with f the features (and positions left, where they do not stand alone); None: the identity.
        """
        if self.full is not None:
            if not prefix:
                return self.full, False
            parts, n, _ = self.full.shape
            half = features(prefix, self.full.reshape(parts, -1, *kernel, n)).reshape(parts, -1, n)
            turned = half.transpose(0, 2, 1).reshape(parts, -1, *kernel, half.shape[1])
            return features(prefix, turned).reshape(parts, half.shape[1], -1), False
        if not prefix:
            return self.shared, True
        first = prefix[0].stage
        parts = first.parts if self.shared is None else len(self.shared)
        whole = compose(prefix, parts, first.parts * first.inputs // parts)
        flat = whole.reshape(parts, -1, whole.shape[-1])
        return flat.transpose(0, 2, 1) @ self.times(whole).reshape(flat.shape), True


def root(moments: Real) -> Real:
    """L of G = L L^T [parts, n, n], with a larger ridge where rounding left G without a root.

    Sums in float32 are off by a few millionths of the largest eigenvalue, which can be more than the ridge there is.

    Raises:
        LinAlgError: not even a ridge of the size of G helps: it is not finite.
    """
    for ridge in (0.0, *(RIDGE * 10.0**power for power in range(3))):
        try:
            return np.asarray(np.linalg.cholesky(ridged(moments, ridge)), np.float64)
        except np.linalg.LinAlgError:
            continue
    return np.asarray(np.linalg.cholesky(ridged(moments, 1.0)), np.float64)


def ridged(gram: Array, ridge: float = RIDGE) -> Real:
    """A matrix with a ridge on its diagonal, parts apart; with the usual one, zero ones become the identity."""
    n = gram.shape[-1]
    mean = np.einsum("...ii->...", gram) / n
    mean = np.where(mean > 0, mean, 1.0)
    return np.asarray(gram + (ridge * mean)[..., None, None] * np.eye(n), np.float64)
