"""A label: one integer array that records which atom stands at each position of some axes of a tensor."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
T = TypeVar("T", bound=np.generic)


class Label:
    """Atoms over one or more axes of a tensor; never changed.

    ``ids`` has the tensor's own rank and size 1 on axes it does not depend on. A label over several axes is a grid;
    ``pack`` is then the axis along which survivors close up: every row along it keeps the same number of atoms, each
    row its own ones, unless the row is removed as a whole.

    Attributes:
        axes: the axes the label depends on.
        is_grid: whether the label depends on several axes.
        start: the first atom where the atoms are consecutive in the order of the positions, else -1.
    """

    # There is one for every tensor and more, each asked for its axes many times: plain slots, filled at once.
    __slots__ = ("axes", "ids", "is_grid", "pack", "start")

    def __init__(self, ids: Ids, pack: int, start: int = -1) -> None:
        self.ids, self.pack, self.start = ids, pack, start
        self.axes = tuple([a for a, n in enumerate(ids.shape) if n > 1])
        self.is_grid = len(self.axes) > 1

    def of(self, values: NDArray[T]) -> NDArray[T]:
        """Return ``values`` [atoms] at the label's positions; a view where its atoms are consecutive."""
        if self.start < 0:
            return values[self.ids]
        return values[self.start : self.start + self.ids.size].reshape(self.ids.shape)

    def outer(self) -> tuple[int, ...]:
        """Return the axes other than the pack axis."""
        return tuple(a for a in self.axes if a != self.pack)


Labels = tuple[Label, ...]
NONE: Labels = ()


def along(ids: Ids, axis: int, rank: int) -> Label:
    """Return a label of a tensor of ``rank`` from a one-dimensional array of atoms along ``axis``."""
    shape = [1] * rank
    shape[axis] = ids.size
    return Label(ids.reshape(shape), axis)


def covering(labels: Labels, axis: int) -> Label | None:
    """Return the label that depends on ``axis``, if any."""
    for label in labels:
        if label.ids.shape[axis] > 1:
            return label
    return None


def drop(labels: Labels, label: Label) -> Labels:
    """Return ``labels`` without ``label``."""
    return tuple([x for x in labels if x is not label])


def kept_sizes(keep: NDArray[np.bool_], pack: int) -> dict[int, int] | None:
    """Return the sizes of a label's axes after packing; None where the surviving positions form no grid.

    Args:
        keep: bool mask of surviving positions, of the label's shape.
        pack: the label's pack axis.
    """
    sizes: dict[int, int] = {}
    while True:
        counts = keep.sum(axis=pack, keepdims=True)
        is_nonempty = counts > 0
        if not is_nonempty.any():
            return None
        width = int(counts.max())
        if (counts[is_nonempty] != width).any():
            return None
        sizes[pack] = width
        keep = is_nonempty
        other_axes = [a for a, n in enumerate(keep.shape) if n > 1]
        if not other_axes:
            return sizes
        pack = other_axes[-1]
