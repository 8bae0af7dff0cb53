"""Scores of units: run a criterion over every slot of every group, one weight in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the arithmetic of bfloat16 and int4)
import numpy as np
from numpy.typing import NDArray

from onnxprune.criteria import Criterion, Slot
from onnxprune.errors import ModelError, UsageError
from onnxprune.groups.units import Group, Units
from onnxprune.labels.label import Ids, Label
from onnxprune.rules.context import Table
from onnxprune.selection.dequantize import is_setting, real_values

Scores = dict[int, NDArray[np.float64]]


def score(table: Table, units: Units, groups: Iterable[Group], criterion: Criterion, seed: int = 0) -> Scores:
    """Scores [units] of every group in ``groups``, by group id.

    A unit's score is the sum over its slots of the slot's scores divided by their mean, so that slots of different size
    weigh the same. Matrices decide where there are any; vectors (biases, BatchNorm) only where there are none, unless
    the criterion itself picks its slots.

    Raises:
        ModelError: a weight holds NaN or infinity.
        UsageError: the criterion applies to none of the groups.
    """
    wanted = {g.id: g for g in groups}
    targets = _Targets(units, wanted.values())
    totals = {i: np.zeros(g.size) for i, g in wanted.items()}
    ranks: dict[int, int] = {}
    for name, label, array in _weights(table, units, targets):
        for number, slot in _slots(table, units, wanted, targets, name, label, array, seed):
            scores = criterion(slot)
            if scores is None:
                continue
            _refuse_nan(criterion, slot, scores)
            rank = 2 if array.ndim > 1 else 1
            if rank < ranks.get(number, 0):
                continue
            if rank > ranks.get(number, 0):
                ranks[number] = rank
                totals[number][:] = 0.0
            _add(totals[number], slot, np.asarray(scores, dtype=np.float64))
    if wanted and not ranks:
        raise UsageError(
            "This criterion applies to no layer of the model.",
            hint="'bn' needs BatchNormalization nodes; try 'l2' or 'gm'.",
        )
    return {i: s for i, s in totals.items() if i in ranks}


class _Targets:
    """The wanted group and the unit that every component counts for, -1 where none: its own, or the row it lies in."""

    def __init__(self, units: Units, groups: Iterable[Group]) -> None:
        self.group = np.full(units.frozen.size, -1, dtype=np.int64)
        self.unit = np.full(units.frozen.size, -1, dtype=np.int64)
        for group in groups:
            self.group[group.units] = group.id
            self.unit[group.units] = np.arange(group.size)
        for rows in reversed(units.atoms.rows):
            above = units.component[rows.rows]
            mine = self.group[above] >= 0
            cells = units.component[rows.cells[mine]]
            fresh = self.group[cells] < 0
            for values in (self.group, self.unit):
                values[cells[fresh]] = np.broadcast_to(values[above[mine]][:, None], cells.shape)[fresh]


def _add(total: NDArray[np.float64], slot: Slot, scores: NDArray[np.float64]) -> None:
    if scores.shape != slot.units.shape:
        raise UsageError(
            f"The criterion returned shape {scores.shape} for {slot.tensor!r}, {slot.units.shape} was expected.",
            hint="A criterion returns one score per channel of the slot.",
        )
    mean = float(np.abs(scores).mean())
    np.add.at(total, slot.units, scores / mean if mean > 0 else scores)


def _weights(table: Table, units: Units, targets: _Targets) -> Iterator[tuple[str, Label, NDArray[Any]]]:
    for name, labels in list(table.items().items()):
        weight = table.graph.weights.get(name)
        if weight is None or is_setting(table.graph, name):
            continue
        array: NDArray[Any] | None = None
        for label in labels:
            if (targets.group[units.component[label.ids]] < 0).all():
                continue
            if array is None:
                array = _readable(real_values(table.graph, name, weight.read()))
            yield name, label, array


def _readable(array: NDArray[Any]) -> NDArray[Any]:
    """Arrays in a type that numpy multiplies quickly and without overflow."""
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def _refuse_nan(criterion: Criterion, slot: Slot, scores: NDArray[Any]) -> None:
    """NaN or infinity in a weight shows in its scores, unless the criterion does not read it all."""
    finite = bool(np.isfinite(scores).all())
    if finite and not getattr(criterion, "reads_all", False):
        finite = bool(np.isfinite(slot.blocks).all())
    if not finite and not np.isfinite(slot.blocks).all():
        raise ModelError(
            f"Weight {slot.tensor!r} holds NaN or infinity.",
            hint="Scores would be meaningless; export the model again.",
        )
    if not finite:
        raise UsageError(f"The criterion gave NaN or infinity for {slot.tensor!r}.", hint="Scores must be finite.")


def _slots(
    table: Table,
    units: Units,
    wanted: dict[int, Group],
    targets: _Targets,
    name: str,
    label: Label,
    array: NDArray[Any],
    seed: int,
) -> Iterator[tuple[int, Slot]]:
    """One slot per wanted group that has units on this label; positions of one unit are laid side by side."""
    component = units.component[label.ids]
    role = [(node.op, i) for node, i in table.graph.consumers.get(name, ())]
    numbers, unit = targets.group[component], targets.unit[component]
    for number in np.flatnonzero(np.bincount(numbers.ravel() + 1)):
        if number == 0:  # what no wanted group claims
            continue
        group = wanted[int(number) - 1]
        owner = np.where(numbers == group.id, unit, -1)
        slot = _slot(name, label, array, owner, group.size, role, (seed, group.id))
        if slot is not None:
            yield group.id, slot


def _slot(
    name: str,
    label: Label,
    array: NDArray[Any],
    owner: Ids,
    size: int,
    role: list[tuple[str, int]],
    seed: tuple[int, int],
) -> Slot | None:
    flat = owner.ravel()
    if not label.is_grid and flat.size == size and np.array_equal(flat, np.arange(size)):
        axis = label.pack
        blocks = array.reshape(int(np.prod(array.shape[:axis])), array.shape[axis], -1)
        return Slot(name, axis, blocks, role, flat, size, seed)
    chosen = np.flatnonzero(flat >= 0)
    if not chosen.size:
        return None
    axes = label.axes
    rows = np.moveaxis(array, axes, range(len(axes))).reshape(flat.size, -1)
    order = chosen[np.argsort(flat[chosen], kind="stable")]
    who = flat[order]
    counts = np.bincount(who, minlength=size)
    present = np.flatnonzero(counts)
    if (counts[present] == counts[present[0]]).all():
        # Equally many positions per unit: all of a unit's positions are one row of features.
        matrix = rows[order].reshape(present.size, -1)
        return Slot(name, label.pack, matrix[None], role, present, size, seed)
    return Slot(name, label.pack, rows[order][None], role, who, size, seed)
