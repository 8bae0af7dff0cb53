"""Means of values, squares and magnitudes, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxprune.statistics.means import Means
from onnxprune.statistics.registry import register

PIECE = 1 << 18
"""Elements looked at at a time: few enough to stay in a processor's cache."""

# Positions of a map below which they are too few to be summed for themselves.
_FEW = 16
# Values that are summed in float32 at a time.
_RUN = 128
# Samples whose flags can be counted in a byte.
_BYTE = 255
# Sums of squares below this may have lost digits in float32.
_TINY = 1e-30

Array = NDArray[Any]
Real = NDArray[np.float64]


@register("moments")
class Moments(Means):
    """``mean``, ``square`` (of squares), ``magnitude`` (of |x|), ``active`` (share that is not 0), each [channels].

    Means over samples and positions, E[x], E[x^2], E[|x|], E[x != 0]. Float32 is summed in float32 over at most 128
    values, and those sums in float64: ``square`` and ``magnitude`` are right to some 1e-7 of themselves, ``mean`` to
    as much of ``magnitude``, and closer where there are many values, whose rounding evens out.
    """

    parts: ClassVar[Sequence[str]] = ("mean", "square", "magnitude", "active")
    additive = True
    tells = True

    def measure(self, maps: Array) -> tuple[int, dict[str, Real]]:
        """Sums over all positions of all samples; weighs as many."""
        channels = maps.shape[1]
        sums = np.zeros((len(self.parts), channels))
        with np.errstate(over="ignore", invalid="ignore"):
            for values, some in _laid_out(maps):
                found = _sums(values, self.parts)
                for row, part in zip(sums[:, some], self.parts, strict=True):
                    row += found[part].reshape(row.size, -1).sum(axis=1)
        return maps.size // channels, dict(zip(self.parts, sums, strict=True))


@register("mean")
class Mean(Moments):
    """``mean`` [channels] alone, as ``moments`` has it."""

    parts = ("mean",)


@register("square")
class Square(Moments):
    """``square`` [channels] alone, as ``moments`` has it."""

    parts = ("square",)


@register("magnitude")
class Magnitude(Moments):
    """``magnitude`` [channels] alone, as ``moments`` has it."""

    parts = ("magnitude",)


@register("active")
class Active(Moments):
    """``active`` [channels] alone, as ``moments`` has it."""

    parts = ("active",)
    tells = False  # NaN counts as active


def _laid_out(maps: Array) -> Iterator[tuple[Array, slice]]:
    """Pieces of maps, and their channels: [samples, channels, positions] where the positions lie side by side and are
    many, else [rows, ...] to be summed over rows, the channels' values (one or more each) behind them.
    """
    samples, channels = maps.shape[:2]
    flat = maps.reshape(samples, channels, -1)
    positions = flat.shape[2]
    if positions >= _FEW and flat.strides[2] == flat.itemsize:
        for few, some in _pieces(flat.shape):
            yield flat[few, some], some
        return
    if positions >= _FEW or flat.strides[1] == flat.itemsize:  # channels lie side by side
        turned = np.moveaxis(flat, 1, 2)
        rows, columns = turned.reshape(samples * positions, channels), 1
    else:
        rows, columns = flat.reshape(samples, channels * positions), positions
    step = max(1, PIECE // max(1, min(len(rows), _BYTE)) // columns)
    for left in range(0, channels, step):
        some = slice(left, min(left + step, channels))
        high = max(1, PIECE // ((some.stop - left) * columns))
        for top in range(0, len(rows), high):
            yield rows[top : top + high, left * columns : some.stop * columns], some


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Blocks of samples and channels with about ``PIECE`` elements, whole maps each."""
    samples, channels, positions = shape
    high = min(samples, _BYTE)
    wide = max(1, PIECE // max(1, high * positions))
    for top in range(0, samples, high):
        for left in range(0, channels, wide):
            yield slice(top, top + high), slice(left, left + wide)


def _sums(values: Array, parts: Sequence[str]) -> dict[str, Real]:
    """What is asked for, summed over samples and positions [s, channels, p], or over rows [rows, columns]."""
    found: dict[str, Real] = {}
    if "active" in parts:
        found["active"] = _count(values != 0)
    if "mean" in parts:
        found["mean"] = _total(values)
    if "magnitude" in parts:
        # Behind a ReLU values are their own magnitudes.
        plain = "mean" in found and values.min() >= 0
        found["magnitude"] = found["mean"] if plain else _total(np.abs(values))
    if "square" in parts:
        found["square"] = _squares(values)
    if values.dtype != np.float64 and not _kept(found, values):
        return _sums(values.astype(np.float64), parts)
    return found


def _kept(found: dict[str, Real], values: Array) -> bool:
    """Whether sums in float32 kept their digits: those of finite values may leave its range, squares at either end."""
    if not all(math.isfinite(sums.sum()) for sums in found.values()):
        return False
    low = found["square"] <= _TINY if "square" in found else np.zeros(0, bool)
    # A channel that is 0 throughout is none of them.
    return not low.any() or not values[:, low].any()


def _total(values: Array) -> Real:
    """Sums of values; a product with ones takes half the time of a sum."""
    if values.ndim == 2:
        return _added([np.ones(r.shape[1], r.dtype) @ r for r in _runs(values, 0)], 2)
    return _added([_dots(r) for r in _runs(values, 2)], 3)


def _dots(runs: Array) -> Array:
    """Sums of runs [s, channels, runs, p], [s, channels, runs], by one product per sample where they lie so."""
    s, channels, count, length = runs.shape
    ones = np.ones(length, runs.dtype)
    if runs.strides[1] == count * runs.strides[2]:
        return np.asarray(runs.reshape(s, channels * count, length) @ ones).reshape(s, channels, count)
    return np.asarray(runs @ ones if length >= _FEW else runs.sum(axis=3))


def _squares(values: Array) -> Real:
    if values.ndim == 2:
        return _added([np.einsum("krc,krc->kc", r, r) for r in _runs(values, 0)], 2)
    return _added([np.einsum("ncrp,ncrp->ncr", r, r) for r in _runs(values, 2)], 3)


def _count(busy: NDArray[np.bool_]) -> Real:
    """How many flags are set: up to 255 of them are counted in a byte, samples or rows first."""
    bits = busy.view(np.uint8)
    total = np.zeros(bits.shape[1])
    for first in range(0, len(bits), _BYTE):
        some = bits[first : first + _BYTE]
        counted = np.add.reduce(some, axis=0, dtype=np.uint8)
        if counted.ndim == 2:
            length = counted.shape[1]
            most = min(_BYTE // len(some), length // _RUN)
            folds = next((k for k in range(most, 1, -1) if length % k == 0), 1)
            counted = np.add.reduce(counted.reshape(-1, folds, length // folds), axis=1, dtype=np.uint8)
            total += _total(counted.astype(np.float32)[None])
        else:
            total += counted
    return total


def _runs(values: Array, axis: int) -> list[Array]:
    """Values in runs along ``axis`` that are short enough to be summed in their own type, and what is left over.

    [rows, columns] as [runs, rows of a run, columns]; [s, channels, p] as [s, channels, runs, p of a run].
    """
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    length = values.shape[axis]
    fewest = 1 if values.dtype == np.float64 else -(-length // _RUN)
    count = next((k for k in range(fewest, 2 * fewest) if length % k == 0), fewest)
    run = length // count
    if axis == 0:
        whole = count * run
        spread = values[:whole].reshape(count, run, values.shape[1])
        return [spread] if whole == length else [spread, values[None, whole:]]
    if count * run == length:
        return [values.reshape(*values.shape[:2], count, run)]
    spread = values[..., : count * run].reshape(*values.shape[:2], count, run)
    return [spread, values[:, :, None, count * run :]]


def _added(runs: Sequence[Array], rank: int) -> Real:
    """Sums of runs, [runs, columns] or [s, channels, runs], as those of [columns] or [channels]."""
    total: Real = runs[0].sum(axis=0 if rank == 2 else (0, 2), dtype=np.float64)
    for run in runs[1:]:
        total += run.sum(axis=0 if rank == 2 else (0, 2), dtype=np.float64)
    return total
