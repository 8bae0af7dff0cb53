"""Sums of squared weights per channel, for criteria that see nothing else: one pass over a weight for all groups."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.groups.units import Group, Units
from onnxprune.labels.label import Ids
from onnxprune.model.elements import aligned, raw
from onnxprune.operators.context import Table
from onnxprune.selection.slots import Claim, Mask, Placed, claims, runs_of, weight_values

Axes = tuple[int, ...]
# Bytes that are squared at a time: what the cache of one core holds beside other things.
_PIECE = 1 << 20
# Bytes up to which pieces are not worth the trouble.
_SMALL = 1 << 16


@dataclass(slots=True)
class Squares:
    """One weight seen from one group: ``sums`` [channels] of the squares of what belongs to each channel.

    ``tensor``, ``units`` are those of a :class:`~onnxprune.criteria.Slot`; ``blocks`` is the weight as it is stored.
    """

    tensor: str
    blocks: NDArray[Any]
    units: Ids
    sums: NDArray[Any]


def weight_squares(
    table: Table, units: Units, groups: Iterable[Group], removed: Mask | None = None, placed: bool = False
) -> Iterator[Placed[Squares]]:
    """What :func:`~onnxprune.selection.slots.weight_slots` shows of every weight, summed up."""
    marginals = Marginals()
    for name, found in claims(table, units, groups, removed, placed):
        array = weight_values(table, name, removed)
        sums = marginals(array, {claim.label.axes for claim in found})
        for claim in found:
            numbers, own = _of_units(claim, sums[claim.label.axes].ravel())
            if numbers.size:
                yield Placed(
                    claim.group.id, Squares(name, array, numbers, own), 2 if array.ndim > 1 else 1, claim.place
                )


def _of_units(claim: Claim, sums: NDArray[Any]) -> tuple[Ids, NDArray[Any]]:
    """Units and their sums; every position by itself where they have different numbers of positions."""
    flat, in_order = claim.owner.ravel(), np.arange(claim.group.size)
    if flat.size == in_order.size and np.count_nonzero(flat == in_order) == flat.size:  # as nearly everywhere
        return in_order, sums
    chosen = (flat >= 0).nonzero()[0]
    if not chosen.size:
        return chosen, sums[chosen]
    runs = runs_of(flat, chosen, in_order)
    if runs is not None:
        start = chosen.item(0)
        return in_order, sums[start : start + chosen.size].reshape(runs, in_order.size).sum(axis=0)
    order = chosen[np.argsort(flat[chosen], kind="stable")]
    who = flat[order]
    counts = np.bincount(who)
    present = np.flatnonzero(counts)
    if (counts[present] == counts[present[0]]).all():
        return present, sums[order].reshape(present.size, -1).sum(axis=1)
    return who, sums[order]


class Marginals:
    """Sums of squares over the axes of one array after another; holds the memory that pieces are squared in."""

    def __init__(self) -> None:
        self._piece, self._ones = np.empty(0, np.uint8), np.empty(0)

    def __call__(self, array: NDArray[Any], wanted: Collection[Axes]) -> dict[Axes, NDArray[Any]]:
        """sum W^2 over all axes but some, for each of these sets of axes, in their order.

        The array is read once, piece by piece, wherever it lies: squared and summed up in the processor's cache.
        """
        with np.errstate(over="ignore"):  # infinity is what the caller looks for
            if array.nbytes <= _SMALL or array.ndim == 1 or any(len(axes) != 1 for axes in wanted):
                whole = np.square(aligned(array))
                return {axes: _sum(whole, axes) for axes in wanted}
            first = next((a for a, n in enumerate(array.shape) if n > 1), 0)
            rows, columns = self._by_pieces(array.reshape(array.shape[first], -1))
            columns = columns.reshape((1,) * (first + 1) + array.shape[first + 1 :])
            return {axes: rows if axes == (first,) else _sum(columns, axes) for axes in wanted}

    def _by_pieces(self, matrix: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Sums of squares along the rows, and along the columns, of a matrix."""
        height, width = matrix.shape
        step = min(height, max(1, _PIECE // max(1, width * matrix.itemsize)))
        piece, ones = self._room(step, width, matrix.dtype)
        rows, columns = np.empty(height, matrix.dtype), np.zeros(width, matrix.dtype)
        for start in range(0, height, step):
            part = matrix[start : start + step]
            squares = piece[: len(part)]
            if not part.flags.aligned:  # as plain bytes, numbers are copied from odd addresses as fast as from others
                plain = raw(part)
                squares.view(plain.dtype)[...] = plain
                part = squares
            np.square(part, out=squares)
            np.matmul(squares, ones[:width], out=rows[start : start + len(part)])
            columns += ones[: len(part)] @ squares
        return rows, columns

    def _room(self, height: int, width: int, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Memory for a matrix, and a vector of at least as many ones as either side is long."""
        needed = height * width * dtype.itemsize
        if self._piece.size < needed:
            self._piece = np.empty(max(needed, _PIECE), np.uint8)
        if self._ones.size < max(height, width) or self._ones.dtype != dtype:
            self._ones = np.ones(max(height, width), dtype)
        return self._piece[:needed].view(dtype).reshape(height, width), self._ones


def _sum(array: NDArray[Any], left: Axes) -> NDArray[Any]:
    """The array summed up over all axes but those that are left."""
    others = tuple([a for a, n in enumerate(array.shape) if n > 1 and a not in left])
    return np.asarray(np.add.reduce(array, axis=others)) if others else array
