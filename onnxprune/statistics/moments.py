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
# Positions that are summed in float32 at a time, and squares below which they are not.
_RUN = 1024
_TINY = 1e-30
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
            short = _in_short_runs(raw)
            if short is not None:
                total, squares = short
                sums["mean"][some] += total
                sums["magnitude"][some] += total
                sums["square"][some] += squares
                sums["active"][some] += _count(raw)
                continue
            piece = raw.astype(np.float64)
            total = _over_positions(piece)
            sums["mean"][some] += total
            sums["active"][some] += _count(raw)
            sums["square"][some] += _squares(piece)
            # Behind a ReLU values are their own magnitudes.
            sums["magnitude"][some] += total if raw.min() >= 0 else _over_positions(np.abs(piece, out=piece))
        return maps.size // channels, sums


def _in_short_runs(raw: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Sums of values and of squares, [channels], in float32 over runs too short to lose digits; None where they would.

    That is for float32 values of one sign, as they are behind a ReLU: nothing cancels.
    """
    samples, channels, positions = raw.shape
    runs = next((k for k in range(1, 65) if positions % k == 0 and positions // k <= _RUN), 0)
    if raw.dtype != np.float32 or positions < _FEW or not runs or raw.min() < 0:
        return None
    spread = raw.reshape(samples, channels, runs, positions // runs)
    with np.errstate(over="ignore"):
        squares = np.einsum("ncrp,ncrp->ncr", spread, spread).sum(axis=(0, 2), dtype=np.float64)
        total = (spread @ np.ones(positions // runs, np.float32)).sum(axis=(0, 2), dtype=np.float64)
    # Squares may leave float32 at either end of its range; such values are rare, and done the long way.
    usual = np.isfinite(squares).all() and np.isfinite(total).all() and (squares[total > 0] > _TINY).all()
    return (total, squares) if usual else None


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
