"""Weights as criteria see them: one slot per weight and group, one weight in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxprune.criteria import Slot
from onnxprune.graph.cost import constant_source, multiplies
from onnxprune.groups.units import Group, Units
from onnxprune.labels.label import Ids, Label
from onnxprune.model.elements import aligned
from onnxprune.operators.context import Table
from onnxprune.selection.dequantize import is_setting, real_values
from onnxprune.selection.targets import Targets

Mask = NDArray[np.bool_]


class Viewed(Protocol):
    """What a criterion is shown of one weight: a :class:`Slot`, or what was summed up for it beforehand."""

    tensor: str
    blocks: NDArray[Any]
    units: Ids


V = TypeVar("V", bound=Viewed)


class Placed(NamedTuple, Generic[V]):
    """A slot of group ``group``. ``rank``: 2 for matrices, 1 for vectors, 0 for maps; ``place``: larger is later."""

    group: int
    slot: V
    rank: int = 0
    place: tuple[int, ...] = (0,)


class Claim(NamedTuple):
    """One label of a weight, as one group sees it: ``owner`` has the unit at each of its positions, -1 for others'."""

    label: Label
    group: Group
    owner: Ids
    place: tuple[int, ...]


def weight_slots(
    table: Table,
    units: Units,
    groups: Iterable[Group],
    seed: int = 0,
    removed: Mask | None = None,
    placed: bool = False,
) -> Iterator[Placed[Slot]]:
    """Every weight from the channels of every group in ``groups``; positions of one unit are laid side by side.

    Args:
        seed: of criteria that draw.
        removed: mask over atoms of what is gone already: it is 0 in the weights, and its units are in no slot.
        placed: find out where in the graph each slot's units are produced (``Placed.place``).
    """
    for name, found in claims(table, units, groups, removed, placed):
        array = aligned(weight_values(table, name, removed))
        role = [(node.op, i) for node, i in table.graph.consumers.get(name, ())]
        for claim in found:
            slot = _slot(name, claim, array, role, seed)
            if slot is not None:
                yield Placed(claim.group.id, slot, 2 if array.ndim > 1 else 1, claim.place)


def claims(
    table: Table, units: Units, groups: Iterable[Group], removed: Mask | None = None, placed: bool = False
) -> Iterator[tuple[str, list[Claim]]]:
    """Weights with what groups claim of them; the arguments are those of :func:`weight_slots`."""
    wanted = {g.id: g for g in groups}
    targets = Targets(units, wanted.values())
    group_of, unit_of = targets.group[units.component], targets.unit[units.component]
    for name, labels in list(table.items().items()):
        if name not in table.graph.weights or is_setting(table.graph, name):
            continue
        found: list[Claim] = []
        for label in labels:
            numbers = label.of(group_of)
            only = _only(numbers)
            if only == -1:  # what no wanted group claims
                continue
            unit = label.of(unit_of)
            if removed is not None:
                numbers = np.where(label.of(removed), -1, numbers)
                only = _only(numbers)
            place = _place(table, name, label) if placed else (0,)
            present = [only] if only is not None else (np.flatnonzero(np.bincount(numbers.ravel() + 1)) - 1).tolist()
            for number in present:
                if number >= 0:
                    owner = unit if only is not None else np.where(numbers == number, unit, -1)
                    found.append(Claim(label, wanted[number], owner, place))
        if found:
            yield name, found


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
                    if not multiplies(node) and constant_source(graph, out) is not None:
                        queue.append(out)
                    else:
                        produced = max(produced, node.index)
    return (1, produced) if produced >= 0 else (0, read)


def weight_values(table: Table, name: str, removed: Mask | None) -> NDArray[Any]:
    """A weight in a type that numpy multiplies quickly and without overflow, wherever it lies in the file's bytes."""
    array = real_values(table.graph, name, table.graph.weights[name].read())
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32)
    return array if removed is None else _zeroed(array, table.get(name), removed)


def _zeroed(array: NDArray[Any], labels: Iterable[Label], removed: Mask) -> NDArray[Any]:
    """A weight with 0 at every position that is gone, along each of its labelled axes."""
    for label in labels:
        gone = label.of(removed)
        if gone.any():
            # Packed codes have an axis of their own behind the others.
            gone = gone.reshape(gone.shape + (1,) * (array.ndim - gone.ndim))
            array = np.where(gone, array.dtype.type(0), array)
    return array


def _slot(name: str, claim: Claim, array: NDArray[Any], role: list[tuple[str, int]], seed: int) -> Slot | None:
    label, size, drawn = claim.label, claim.group.size, (seed, claim.group.id)
    flat = claim.owner.ravel()
    in_order = np.arange(size)
    chosen = (flat >= 0).nonzero()[0]
    if not chosen.size:
        return None
    runs = None if label.is_grid else runs_of(flat, chosen, in_order)
    if runs is not None:
        # No gather: a weight's own memory, or where runs lie side by side (queries and keys) a copy in large pieces.
        axis, start = label.pack, chosen.item(0)
        whole = array.reshape(math.prod(array.shape[:axis]), array.shape[axis], -1)
        blocks = whole[:, start : start + chosen.size].reshape(len(whole) * runs, size, -1)
        return Slot(name, axis, blocks, role, in_order, size, drawn)
    axes = label.axes
    rows = np.moveaxis(array, axes, range(len(axes))).reshape(flat.size, -1)
    order = chosen[np.argsort(flat[chosen], kind="stable")]
    who = flat[order]
    counts = np.bincount(who, minlength=size)
    present = np.flatnonzero(counts)
    if (counts[present] == counts[present[0]]).all():
        # Equally many positions per unit: all of a unit's positions are one row of features.
        matrix = rows[order].reshape(present.size, -1)
        return Slot(name, label.pack, matrix[None], role, present, size, drawn)
    return Slot(name, label.pack, rows[order][None], role, who, size, drawn)


def runs_of(flat: Ids, chosen: Ids, in_order: Ids) -> int | None:
    """How often all units follow each other ``in_order`` where ``chosen`` [positions] is one run; else None."""
    count, rest = divmod(chosen.size, in_order.size)
    start = chosen.item(0)
    if rest or chosen.item(-1) - start != chosen.size - 1:
        return None
    units = flat[start : start + chosen.size].reshape(count, in_order.size)
    return count if np.count_nonzero(units == in_order) == units.size else None
