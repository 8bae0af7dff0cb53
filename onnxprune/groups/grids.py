"""Grids of units: what may stand in for what, what must be cut together, and whether cells or whole rows go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxprune.groups.units import Group, Units
from onnxprune.labels.atoms import Atoms, mix
from onnxprune.labels.label import Ids


def views_of(atoms: Atoms, component: Ids) -> list[Ids]:
    """Every grid as rows of components, each once; rows that go as a whole stand for themselves: their axis counts."""
    found: dict[tuple[tuple[int, ...], bytes], Ids] = {}
    for label in atoms.views.values():
        ids, axes, pack = component[label.ids], list(label.axes), label.pack
        while len(axes) > 1 and (ids == ids.take([0], axis=pack)).all():
            ids = ids.take([0], axis=pack)
            axes.remove(pack)
            pack = axes[-1]
        if len(axes) > 1:
            rows = np.moveaxis(ids, pack, -1).reshape(-1, ids.shape[pack])
            found.setdefault((rows.shape, rows.tobytes()), rows)
    return list(found.values())


def _counts(rows: Ids, values: Ids) -> dict[int, Ids]:
    """How often each value of ``values`` (same shape as ``rows``) occurs per row: {value: [rows]}."""
    return {int(v): (values == v).sum(axis=1) for v in np.unique(values)}


def link(group_of: Ids, views: list[Ids], frozen: NDArray[np.bool_]) -> tuple[Ids, set[int]]:
    """Groups that fill the rows of a grid unequally must be cut together; with something frozen, not at all."""
    group_of = group_of.copy()
    blocked: set[int] = set()
    for view in views:
        uneven = [g for g, c in _counts(view, group_of[view]).items() if (c != c[0]).any()]
        if not uneven:
            continue
        real = [g for g in uneven if g >= 0]
        for other in real[1:]:
            group_of[group_of == other] = real[0]
            if other in blocked:
                blocked.add(real[0])
        if real and -1 in uneven:
            blocked.add(real[0])
    return group_of, blocked


def classes_of(units: Ids, views: Sequence[Ids]) -> Ids:
    """Class of every unit: units that appear in the same rows of every grid may stand in for each other."""
    keys = np.zeros(units.size, dtype=np.uint64)
    order = np.argsort(units)
    for number, view in enumerate(views):
        where = _place(units, order, view)
        inside = where >= 0
        if inside.any():
            rows = np.broadcast_to(np.arange(len(view))[:, None] + (number + 1) * 1_000_003, view.shape)
            np.add.at(keys, where[inside], mix(rows[inside]))
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _place(values: Ids, order: Ids, wanted: Ids) -> Ids:
    """Where in ``values`` (sorted by ``order``) each of ``wanted`` stands, -1 where it does not."""
    found = np.minimum(np.searchsorted(values, wanted, sorter=order), values.size - 1)
    place = order[found]
    return np.where(values[place] == wanted, place, -1)


def choose_rows(units: Units, views: Mapping[int, Sequence[Ids]], axis: str = "head_dim") -> None:
    """Cells or rows: which of the two is cut where both could be.

    Args:
        units: their groups' ``prunable`` and ``children`` are filled in.
        views: the grids that each group's units appear in.
        axis: ``head_dim``: rows (heads) are cut only where the cells beneath them cannot be; ``heads``: wherever they
            can be, in place of the cells; ``both``: rows, and cells of the rows that stay.
    """
    beneath, stuck = _children(units)
    touching = defaultdict[int, list[int]](list)
    for number, rows in enumerate(units.atoms.rows):
        for child in np.unique(units.group_of[units.component[rows.cells]]):
            touching[int(child)].append(number)
    for parent, children in beneath.items():
        real, group = {c for c in children if c >= 0}, units.groups[parent]
        group.children = sorted(real)
        cells_work = parent not in stuck and real and all(units.groups[c].prunable for c in real) and -1 not in children
        taken = any(units.groups[c].covered for c in real)
        group.prunable &= not (taken or (cells_work and axis == "head_dim"))
        group.prunable = group.prunable and _go_whole(units, group, views, touching)
        if group.prunable and not (cells_work and axis == "both"):
            for c in real:
                units.groups[c].prunable, units.groups[c].covered = False, True


def _children(units: Units) -> tuple[dict[int, set[int]], set[int]]:
    """Groups of the cells beneath every group of rows, and the groups of rows that hold cells of their own."""
    beneath: dict[int, set[int]] = defaultdict(set)
    stuck: set[int] = set()
    for rows in units.atoms.rows:
        parents = units.group_of[units.component[rows.rows]]
        children = units.group_of[units.component[rows.cells]]
        for parent in np.unique(parents[parents >= 0]):
            own = children[parents == parent]
            beneath[int(parent)].update(int(c) for c in np.unique(own) if c != parent)
            if (own == parent).any():
                stuck.add(int(parent))
    return beneath, stuck


def _go_whole(
    units: Units, group: Group, views: Mapping[int, Sequence[Ids]], touching: Mapping[int, Sequence[int]]
) -> bool:
    """Whether every row of every grid over the same cells goes with one unit of the group, or stays."""
    cells, owners = _owned(units, group, touching)
    order = np.argsort(cells)
    for child in group.children:
        for view in views.get(child, ()):
            if not _same(_owner(cells, owners, order, view)).all():
                return False
        for number in touching.get(child, ()):
            rows = units.atoms.rows[number]
            owner = _owner(cells, owners, order, units.component[rows.cells])
            whole = _same(owner) & (owner[:, 0] >= 0)
            if units.frozen[units.component[rows.rows[whole]]].any():
                return False
    return True


def _owned(units: Units, group: Group, touching: Mapping[int, Sequence[int]]) -> tuple[Ids, Ids]:
    """Components of the cells beneath a group of rows, and the unit that takes each along."""
    order = np.argsort(group.units)
    cells, owners = [group.units], [np.arange(group.size)]
    for number in sorted({n for c in group.children for n in touching.get(c, ())}):
        rows = units.atoms.rows[number]
        place = _place(group.units, order, units.component[rows.rows])
        mine = place >= 0
        below = units.component[rows.cells[mine]]
        cells.append(below.ravel())
        owners.append(np.repeat(place[mine], below.shape[1]))
    found, first = np.unique(np.concatenate(cells), return_index=True)
    return found, np.concatenate(owners)[first]


def _owner(cells: Ids, owners: Ids, order: Ids, wanted: Ids) -> Ids:
    place = _place(cells, order, wanted)
    return np.where(place >= 0, owners[place], -1)


def _same(rows: Ids) -> NDArray[np.bool_]:
    """Rows that hold one value throughout."""
    return np.asarray((rows == rows[:, :1]).all(axis=1))
