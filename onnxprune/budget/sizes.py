"""Shapes of every tensor as functions of how many steps each group keeps, for many choices of counts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.groups.units import Group, Units
from onnxprune.labels.label import Ids, Label

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]
Term = tuple[int, ...]
ShapeOf = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class AxisSize:
    """The size of one axis: the sum over ``terms`` {columns of counts: positions} of positions times kept shares."""

    axis: int
    terms: dict[Term, int]

    def at(self, shares: Shares) -> NDArray[np.int64]:
        """Sizes [cuts] for shares [cuts, groups]."""
        total = np.zeros(len(shares))
        for columns, positions in self.terms.items():
            total += positions * reduce(np.multiply, (shares[:, c] for c in columns), np.ones(len(shares)))
        return np.rint(total).astype(np.int64)

    @property
    def columns(self) -> set[int]:
        """The groups that the size depends on."""
        return {c for term in self.terms for c in term}


class Sizes:
    """Sizes of all tensors at the first probe, from the steps that groups keep.

    Exact where the units of a group appear equally often on every axis, which is so in all but odd graphs (one channel
    used twice, its neighbour once): there a unit counts as the average of its group.

    Args:
        analysis: of the original. groups: those that may be cut; their order is that of the columns of counts.
    """

    def __init__(self, analysis: Analysis, groups: Sequence[Group]) -> None:
        self.analysis, self.groups = analysis, list(groups)
        self.steps = np.array([g.steps for g in groups], dtype=np.int64)
        owners = _Owners(analysis.units, groups)
        self._axes: dict[str, list[AxisSize]] = {}
        known: dict[int, tuple[Label, list[AxisSize]]] = {}
        for name, labels in analysis.table.items().items():
            found: list[AxisSize] = []
            for label in labels:
                if id(label) not in known:
                    known[id(label)] = label, _axes_of(owners, analysis.units.component, label)
                found += known[id(label)][1]
            if found:
                self._axes[name] = found

    @property
    def whole(self) -> Counts:
        """Counts [1, groups] of the original."""
        return self.steps[None, :]

    def touched(self, name: str) -> bool:
        """Whether the size of the tensor depends on any count."""
        return name in self._axes

    def axes(self, name: str) -> list[int]:
        """The axes of a tensor whose size depends on counts."""
        return [axis.axis for axis in self._axes.get(name, ())]

    def columns(self, name: str) -> set[int]:
        """The groups that the size of a tensor depends on."""
        return {c for axis in self._axes.get(name, ()) for c in axis.columns}

    def at(self, kept: Counts) -> ShapeOf:
        """Shapes for counts [cuts, groups] of kept steps: a size that depends on them is an array [cuts]."""
        shares = kept / self.steps
        made: dict[str, Any] = {}

        def shape(name: str) -> Any:
            if name not in made:
                before = self.analysis.facts.shape(name)
                made[name] = before if before is None else self._shape(name, before, shares)
            return made[name]

        return shape

    def _shape(self, name: str, before: Sequence[Any], shares: Shares) -> tuple[Any, ...]:
        result = list(before)
        for size in self._axes.get(name, ()):
            now = size.at(shares)
            held = result[size.axis]
            # Two labels of a weight may share an axis: what both leave stays.
            result[size.axis] = np.minimum(held, now) if isinstance(held, np.ndarray) else now
        return tuple(result)


class _Owners:
    """Which of the wanted groups decide about a component, and which of their units it goes with.

    Attributes:
        column, unit: [components, depth]: its own group first, then those of the rows it lies in; -1 where none.
    """

    def __init__(self, units: Units, groups: Sequence[Group]) -> None:
        count = units.frozen.size
        layers = [(np.full(count, -1, np.int64), np.full(count, -1, np.int64))]
        for number, group in enumerate(groups):
            layers[0][0][group.units], layers[0][1][group.units] = number, np.arange(group.size)
        for rows in reversed(units.atoms.rows):
            above, cells = units.component[rows.rows], units.component[rows.cells]
            for column, unit in tuple(layers):
                mine = np.broadcast_to(column[above][:, None], cells.shape)
                theirs = np.broadcast_to(unit[above][:, None], cells.shape)
                _put(layers, cells, mine, theirs)
        self.column = np.stack([c for c, _ in layers], axis=1)
        self.unit = np.stack([u for _, u in layers], axis=1)


def _put(layers: list[tuple[Ids, Ids]], cells: Ids, columns: Ids, units: Ids) -> None:
    """Note an owner of cells in the first layer that is free there; an owner that is known already is not noted."""
    left = columns >= 0
    for column, unit in layers:
        left &= column[cells] != columns
        free = left & (column[cells] < 0)
        column[cells[free]], unit[cells[free]] = columns[free], units[free]
        left &= ~free
    if left.any():
        layers.append((np.full_like(layers[0][0], -1), np.full_like(layers[0][1], -1)))
        _put(layers, np.where(left, cells, cells[left][0]), np.where(left, columns, -1), units)


def _axes_of(owners: _Owners, component: Ids, label: Label) -> list[AxisSize]:
    """The axes of a label whose size depends on counts.

    Along the pack axis go cells, along an outer one whole rows: a group decides about the first axis, from the pack
    axis outwards, along which its units differ.
    """
    where = component[label.ids]
    column, unit = owners.column[where], owners.unit[where]
    rest = [a for a in reversed(label.axes) if a != label.pack]
    order = [label.pack, *rest] if label.pack in label.axes else rest
    taken: set[int] = set()
    result = []
    for axis in order:
        line = tuple(slice(None) if a == axis else 0 for a in range(label.ids.ndim))
        mine, units = column[line], unit[line]
        decides = {
            int(c)
            for c in np.unique(mine[mine >= 0])
            if c not in taken and (len(order) == 1 or np.unique(units[mine == c]).size > 1)
        }
        if decides:
            taken |= decides
            held = np.sort(np.where(np.isin(mine, list(decides)), mine, -1), axis=1)
            kinds, positions = np.unique(held, axis=0, return_counts=True)
            terms = {tuple(c for c in k if c >= 0): n for k, n in zip(kinds.tolist(), positions.tolist(), strict=True)}
            result.append(AxisSize(axis, terms))
    return result
