"""Scores of units: run a criterion over every slot of every group, one weight in memory at a time."""

from __future__ import annotations

import zlib
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
    totals = {i: np.zeros(g.size) for i, g in wanted.items()}
    ranks: dict[int, int] = {}
    seen: set[int] = set()
    for name, label, array in _weights(table, units, wanted):
        for number, slot in _slots(table, units, wanted, name, label, array, seed):
            scores = criterion(slot)
            if scores is None:
                continue
            rank = 2 if array.ndim > 1 else 1
            if rank < ranks.get(number, 0):
                continue
            if rank > ranks.get(number, 0):
                ranks[number] = rank
                totals[number][:] = 0.0
            seen.add(number)
            _add(totals[number], slot, np.asarray(scores, dtype=np.float64))
    if wanted and not seen:
        raise UsageError(
            "This criterion applies to no layer of the model.", hint="'bn' needs BatchNormalization nodes; try 'l2' or 'gm'."
        )
    return {i: s for i, s in totals.items() if i in seen}


def _add(total: NDArray[np.float64], slot: Slot, scores: NDArray[np.float64]) -> None:
    if scores.shape != slot.units.shape:
        raise UsageError(
            f"The criterion returned shape {scores.shape} for {slot.tensor!r}, {slot.units.shape} was expected.",
            hint="A criterion returns one score per channel of the slot.",
        )
    mean = float(np.abs(scores).mean())
    np.add.at(total, slot.units, scores / mean if mean > 0 else scores)


def _weights(table: Table, units: Units, wanted: dict[int, Group]) -> Iterator[tuple[str, Label, NDArray[Any]]]:
    chosen = np.zeros(units.frozen.size + 1, dtype=bool)
    for group in wanted.values():
        chosen[group.units] = True
        chosen[_beneath(units, group)] = True
    for name, labels in list(table.items().items()):
        weight = table.graph.weights.get(name)
        if weight is None:
            continue
        array: NDArray[Any] | None = None
        for label in labels:
            if not chosen[units.component[label.ids]].any():
                continue
            if array is None:
                array = _readable(name, weight.read())
            yield name, label, array


def _readable(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Arrays that numpy multiplies quickly and without overflow; NaN and infinity are refused."""
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32)
    # The sum of a finite array is finite unless it overflows, and then the slow check decides.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(np.add.reduce(array, axis=None)) or bool(np.isfinite(array).all())
    if not finite:
        raise ModelError(f"Weight {name!r} holds NaN or infinity.", hint="Scores would be meaningless; export the model again.")
    return array


def _beneath(units: Units, group: Group) -> Ids:
    mask = np.zeros(units.frozen.size, dtype=bool)
    mask[group.units] = True
    return np.flatnonzero(units.close(mask))


def _owner(units: Units, group: Group) -> Ids:
    """Unit number of every component that goes with a unit of the group, -1 elsewhere."""
    owner = np.full(units.frozen.size, -1, dtype=np.int64)
    owner[group.units] = np.arange(group.size)
    if group.kind == "heads":
        for rows in reversed(units.atoms.rows):
            parent = owner[units.component[rows.rows]]
            mine = parent >= 0
            cells = units.component[rows.cells[mine]]
            fresh = owner[cells] < 0
            owner[cells[fresh]] = np.broadcast_to(parent[mine][:, None], cells.shape)[fresh]
    return owner


def _slots(
    table: Table, units: Units, wanted: dict[int, Group], name: str, label: Label, array: NDArray[Any], seed: int
) -> Iterator[tuple[int, Slot]]:
    """One slot per wanted group that has units on this label; positions of one unit are laid side by side."""
    component = units.component[label.ids]
    role = [(node.op, i) for node, i in table.graph.consumers.get(name, ())]
    numbers = np.unique(units.group_of[component])
    direct = [wanted[int(n)] for n in numbers if int(n) in wanted]
    parents = [g for g in wanted.values() if g.kind == "heads" and g not in direct and set(g.children) & set(numbers.tolist())]
    for group in (*direct, *parents):
        owner = _owner(units, group)[component]
        rng = np.random.default_rng([seed, zlib.crc32(str(group.id).encode())])
        slot = _slot(name, label, array, owner, group.size, role, rng)
        if slot is not None:
            yield group.id, slot


def _slot(
    name: str,
    label: Label,
    array: NDArray[Any],
    owner: Ids,
    size: int,
    role: list[tuple[str, int]],
    rng: np.random.Generator,
) -> Slot | None:
    flat = owner.ravel()
    if not label.is_grid and flat.size == size and np.array_equal(flat, np.arange(size)):
        axis = label.pack
        blocks = array.reshape(int(np.prod(array.shape[:axis])), array.shape[axis], -1)
        return Slot(name, axis, blocks, role, flat, size, rng)
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
        return Slot(name, label.pack, matrix[None], role, present, size, rng)
    return Slot(name, label.pack, rows[order][None], role, who, size, rng)
