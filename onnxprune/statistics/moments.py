"""Means of values, squares and magnitudes, channel by channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.statistics.means import Means
from onnxprune.statistics.registry import register

PIECE = 1 << 18
"""Elements converted to float64 at a time: few enough to stay in a processor's cache."""


@register("moments")
class Moments(Means):
    """``mean``, ``square`` (of squares), ``magnitude`` (of |x|), ``active`` (share that is not 0), each [channels].

    Means over samples and positions, E[x], E[x^2], E[|x|], E[x != 0].
    """

    def measure(self, maps: NDArray[Any]) -> tuple[int, dict[str, NDArray[np.float64]]]:
        """Sums over all positions of all samples; weighs as many."""
        channels = maps.shape[1]
        sums = {name: np.zeros(channels) for name in ("mean", "square", "magnitude", "active")}
        for samples, some in _pieces(maps.shape, PIECE):
            piece = maps[samples, some].astype(np.float64)
            piece = piece.reshape(*piece.shape[:2], -1)
            sums["mean"][some] += piece.sum(axis=(0, 2))
            sums["active"][some] += np.count_nonzero(piece, axis=(0, 2))
            np.abs(piece, out=piece)
            sums["magnitude"][some] += piece.sum(axis=(0, 2))
            np.square(piece, out=piece)
            sums["square"][some] += piece.sum(axis=(0, 2))
        return maps.size // channels, sums


def _pieces(shape: tuple[int, ...], limit: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of samples and channels with about ``limit`` elements, whole maps each."""
    samples, channels, *space = shape
    some = max(1, limit // max(1, int(np.prod(space))))
    wide = min(channels, some)
    high = max(1, some // wide)
    for top in range(0, samples, high):
        for left in range(0, channels, wide):
            yield slice(top, top + high), slice(left, left + wide)
