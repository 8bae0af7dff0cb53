"""Weights as criteria see them: one slot per weight and group, one weight in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (gives numpy the arithmetic of bfloat16 and int4)
import numpy as np
from numpy.typing import NDArray

from onnxprune.criteria import Slot
from onnxprune.graph.cost import LAYERS, constant_source
from onnxprune.groups.units import Group, Units
from onnxprune.labels.label import Ids, Label
from onnxprune.model.elements import aligned
from onnxprune.rules.context import Table
from onnxprune.selection.dequantize import is_setting, real_values
from onnxprune.selection.targets import Targets

Mask = NDArray[np.bool_]
# Bytes of a weight that is copied once for all of its axes, if it has to be.
_SMALL = 1 << 22


class Placed(NamedTuple):
    """A slot of group ``group``. ``rank``: 2 for matrices, 1 for vectors, 0 for maps; ``place``: larger is later."""

    group: int
    slot: Slot
    rank: int = 0
    place: tuple[int, ...] = (0,)


def weight_slots(
    table: Table,
    units: Units,
    groups: Iterable[Group],
    seed: int = 0,
    removed: Mask | None = None,
    placed: bool = False,
) -> Iterator[Placed]:
    """Every weight from the channels of every group in ``groups``; positions of one unit are laid side by side.

    Args:
        seed: of criteria that draw.
        removed: mask over atoms of what is gone already: it is 0 in the weights, and its units are in no slot.
        placed: find out where in the graph each slot's units are produced (``Placed.place``).
    """
    wanted = {g.id: g for g in groups}
    targets = Targets(units, wanted.values())
    group_of, unit_of = targets.group[units.component], targets.unit[units.component]
    for name, label, array, numbers, only in _weights(table, group_of, removed):
        role = [(node.op, i) for node, i in table.graph.consumers.get(name, ())]
        unit = unit_of[label.ids]
        if removed is not None:
            numbers = np.where(removed[label.ids], -1, numbers)
            only = _only(numbers)
        place = _place(table, name, label) if placed else (0,)
        present = [only] if only is not None else (np.flatnonzero(np.bincount(numbers.ravel() + 1)) - 1).tolist()
        for number in present:
            if number < 0:  # what no wanted group claims
                continue
            group = wanted[number]
            owner = unit if only is not None else np.where(numbers == group.id, unit, -1)
            slot = _slot(name, label, array, owner, group.size, role, (seed, group.id))
            if slot is not None:
                yield Placed(group.id, slot, 2 if array.ndim > 1 else 1, place)


def _only(numbers: Ids) -> int | None:
    """The number that stands everywhere, None where several do."""
    # Most weights are small and of one group: counting what is equal takes a fraction of what min and max do.
    first = numbers.item(0)
    return first if np.count_nonzero(numbers == first) == numbers.size else None


def _place(table: Table, name: str, label: Label) -> tuple[int, int]:
    """Where a weight stands, to be compared: in front of all others stand those whose channels leave no layer here."""
    graph, own = table.graph, np.unique(label.ids)
    queue, produced, read = [name], -1, -1
    while queue:
        for node, _ in graph.consumers.get(queue.pop(), ()):
            read = max(read, node.index)
            for out in node.outputs:
                if out and any(np.isin(x.ids, own).any() for x in table.get(out)):
                    if node.op not in LAYERS and constant_source(graph, out) is not None:
                        queue.append(out)
                    else:
                        produced = max(produced, node.index)
    return (1, produced) if produced >= 0 else (0, read)


def _weights(
    table: Table, group_of: Ids, removed: Mask | None
) -> Iterator[tuple[str, Label, NDArray[Any], Ids, int | None]]:
    """Weights with a label that wanted groups claim: name, label, values, the group at each position (-1: none), and
    the one that stands everywhere.

    Args:
        group_of: wanted group of every atom.
    """
    for name, labels in list(table.items().items()):
        weight = table.graph.weights.get(name)
        if weight is None or is_setting(table.graph, name):
            continue
        array: NDArray[Any] | None = None
        for label in labels:
            numbers = group_of[label.ids]
            only = _only(numbers)
            if only == -1:
                continue
            if array is None:
                array = _readable(real_values(table.graph, name, weight.read()))
                if removed is not None:
                    array = _zeroed(array, labels, removed)
            yield name, label, array, numbers, only


def _zeroed(array: NDArray[Any], labels: Iterable[Label], removed: Mask) -> NDArray[Any]:
    """A weight with 0 at every position that is gone, along each of its labelled axes."""
    for label in labels:
        gone = removed[label.ids]
        if gone.any():
            array = np.where(gone, array.dtype.type(0), array)
    return array


def _readable(array: NDArray[Any]) -> NDArray[Any]:
    """Arrays in a type that numpy multiplies quickly and without overflow, small ones where it does so, too.

    Large ones stay where they lie in the file's bytes: a criterion may read them there, see ``any_address``.
    """
    if array.dtype not in (np.float32, np.float64):
        return array.astype(np.float32)
    return aligned(array) if array.nbytes <= _SMALL else array


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
    in_order = np.arange(size)
    chosen = (flat >= 0).nonzero()[0]
    if not chosen.size:
        return None
    runs = None if label.is_grid else _runs(flat, chosen, in_order)
    if runs is not None:
        # No gather: a weight's own memory, or where runs lie side by side (queries and keys) a copy in large pieces.
        axis, start = label.pack, chosen.item(0)
        whole = array.reshape(math.prod(array.shape[:axis]), array.shape[axis], -1)
        blocks = whole[:, start : start + chosen.size].reshape(len(whole) * runs, size, -1)
        return Slot(name, axis, blocks, role, in_order, size, seed)
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


def _runs(flat: Ids, chosen: Ids, in_order: Ids) -> int | None:
    """How often all units follow each other ``in_order`` where ``chosen`` [positions] is one run; else None."""
    count, rest = divmod(chosen.size, in_order.size)
    start = chosen.item(0)
    if rest or chosen.item(-1) - start != chosen.size - 1:
        return None
    units = flat[start : start + chosen.size].reshape(count, in_order.size)
    return count if np.count_nonzero(units == in_order) == units.size else None
