"""Sizes and positions after a removal, derived from the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.labels.label import Ids, Label, Labels, covering, kept_sizes
from onnxprune.operators.context import Table

Mask = NDArray[np.bool_]


class Ragged(Exception):
    """A grid would lose its form; carries the tensor."""


class Survivors:
    """Survivors of every tensor.

    Args:
        table: the labels.
        removed: bool mask over atoms, True where removed.
        same: {tensor that the table does not know: one of the same channels}.
    """

    def __init__(self, table: Table, removed: Mask, same: Mapping[str, str] | None = None) -> None:
        self._table, self.removed, self._same = table, removed, same or {}
        self._by_label: dict[int, tuple[Label, Mask | None, dict[int, int] | None]] = {}
        self._sizes: dict[str, dict[int, int]] = {}

    def mask(self, label: Label) -> Mask | None:
        """Return surviving positions in the label's shape; None where all survive."""
        return self._survivors(label)[1]

    def _survivors(self, label: Label) -> tuple[Label, Mask | None, dict[int, int] | None]:
        """Return the label, its mask, and its axes' sizes by ``kept_sizes``.

        Cached, since many tensors share a label.
        """
        known = self._by_label.get(id(label))
        if known is None:
            removed = label.of(self.removed)
            num_removed = int(np.count_nonzero(removed))
            keep = np.logical_not(removed) if num_removed else None
            if keep is None:
                sizes: dict[int, int] | None = {}
            elif label.axes == (label.pack,):
                sizes = {label.pack: removed.size - num_removed} if num_removed < removed.size else None
            else:
                sizes = kept_sizes(keep, label.pack)
            self._by_label[id(label)] = known = (label, keep, sizes)
        return known

    def _labels(self, name: str) -> Labels:
        return self._table.get(self._same.get(name, name) if self._same else name)

    def touched(self, name: str) -> bool:
        """Return whether the tensor loses positions."""
        for label in self._labels(name):  # noqa: SIM110  (asked of every tensor: a loop is faster than any())
            if self._survivors(label)[1] is not None:
                return True
        return False

    def sizes(self, name: str) -> dict[int, int]:
        """Return the new size of every axis that shrinks."""
        known = self._sizes.get(name)
        if known is not None:
            return known
        result: dict[int, int] = {}
        for label in self._labels(name):
            _, keep, sizes = self._survivors(label)
            if keep is not None:
                if sizes is None:
                    raise Ragged(name)
                # A weight's grid may share an axis with a label of its own: the smaller size is the new one.
                for axis, size in sizes.items():
                    if size < keep.shape[axis]:
                        result[axis] = min(size, result.get(axis, size))
        self._sizes[name] = result
        return result

    def shape(self, name: str) -> tuple[Any, ...] | None:
        """Return the new shape at the first probe; None where the rank is unknown."""
        shape = self._table.facts.shape(self._same.get(name, name))
        if shape is None:
            return None
        sizes = self.sizes(name)
        return tuple(sizes.get(a, n) for a, n in enumerate(shape)) if sizes else tuple(shape)

    def keep(self, name: str, axis: int) -> Mask | None:
        """Return surviving positions along one axis (of any row that survives); None where all do."""
        label = covering(self._labels(name), axis)
        keep = None if label is None else self.mask(label)
        if label is None or keep is None:
            return None
        others = tuple(a for a in range(keep.ndim) if a != axis)
        if axis != label.pack:
            return np.asarray(keep.any(axis=others))
        rows = np.moveaxis(keep, axis, -1).reshape(-1, keep.shape[axis])
        nonempty_rows = rows[rows.any(axis=1)]
        return np.asarray(nonempty_rows[0])

    def kept_between(self, name: str, axis: int, start: int, stop: int) -> int:
        """Return surviving positions of ``start:stop`` along an axis, per surviving row."""
        keep = self.keep(name, axis)
        return stop - start if keep is None else int(keep[start:stop].sum())

    def steps(self, name: str) -> list[tuple[int, Ids]]:
        """Return gather steps (axis, index) that prune a weight; a grid's pack axis has an index per row."""
        labels = [(x, k) for x in self._labels(name) if (k := self.mask(x)) is not None]
        if all(x.axes == (x.pack,) for x, _ in labels) and len({x.pack for x, _ in labels}) == len(labels):
            return [(x.pack, keep.ravel().nonzero()[0]) for x, keep in labels]
        row_masks: dict[int, Mask] = {}
        for label, keep in labels:
            for axis in label.outer() if label.is_grid else label.axes:
                row_mask = keep.ravel()
                if label.is_grid:
                    row_mask = np.asarray(keep.any(axis=tuple(a for a in range(keep.ndim) if a != axis)))
                row_masks[axis] = row_masks[axis] & row_mask if axis in row_masks else row_mask
        steps = [(axis, np.flatnonzero(row_mask)) for axis, row_mask in row_masks.items() if not row_mask.all()]
        for label, keep in labels:
            if not label.is_grid:
                continue
            for axis in label.outer():
                keep = keep.take(np.flatnonzero(row_masks[axis]), axis=axis)
            width = int(keep.sum(axis=label.pack).max())
            if width == keep.shape[label.pack]:
                continue
            # A stable sort of "removed" puts the survivors of every row first, in their order.
            order = np.argsort(~keep, axis=label.pack, kind="stable")
            index = order.take(np.arange(width), axis=label.pack)
            rows = np.moveaxis(index, label.pack, -1).reshape(-1, width)
            steps.append((label.pack, rows[0] if (rows == rows[0]).all() else index))
        return steps
