"""Means of values, squares and magnitudes, channel by channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.statistics.means import Means
from onnxprune.statistics.registry import register

PIECE = 1 << 16
"""Elements converted to float64 at a time: few enough to stay in a processor's cache."""

# Positions of a map below which matrix products cost more than they gain.
_FEW = 16
# How many bits of a byte are set, by its value.
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.float64)


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
            raw = maps[samples, some]
            raw = raw.reshape(*raw.shape[:2], -1)
            piece = raw.astype(np.float64)
            total = _over_positions(piece)
            sums["mean"][some] += total
            sums["active"][some] += _count(raw)
            sums["square"][some] += _squares(piece)
            # Behind a ReLU values are their own magnitudes.
            sums["magnitude"][some] += total if raw.min() >= 0 else _over_positions(np.abs(piece, out=piece))
        return maps.size // channels, sums


def _over_positions(piece: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums [channels] of [samples, channels, positions]; a product with ones takes half the time of a sum."""
    if piece.shape[2] < _FEW:
        return np.asarray(piece.sum(axis=(0, 2)))
    return np.asarray((piece @ np.ones(piece.shape[2])).sum(axis=0))


def _squares(piece: NDArray[np.float64]) -> NDArray[np.float64]:
    if piece.shape[2] < _FEW:
        return np.asarray(np.square(piece).sum(axis=(0, 2)))
    return np.asarray((piece[:, :, None, :] @ piece[:, :, :, None]).sum(axis=(0, 2, 3)))


def _count(raw: NDArray[Any]) -> NDArray[np.float64]:
    """How many of [samples, channels, positions] are not 0, [channels]; eight at a time where that is worth it."""
    busy = raw != 0
    if raw.shape[2] < _FEW:
        return np.asarray(busy.sum(axis=(0, 2)), dtype=np.float64)
    return _over_positions(_ONES[np.packbits(busy, axis=2)])


def _pieces(shape: tuple[int, ...], limit: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of samples and channels with about ``limit`` elements, whole maps each."""
    samples, channels, *space = shape
    some = max(1, limit // max(1, int(np.prod(space))))
    wide = min(channels, some)
    high = max(1, some // wide)
    for top in range(0, samples, high):
        for left in range(0, channels, wide):
            yield slice(top, top + high), slice(left, left + wide)
