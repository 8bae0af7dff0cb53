"""Units, groups and grids: which atoms are removed together, and which units compete."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from onnxprune.labels.atoms import Atoms, Barrier, Reason, mix
from onnxprune.labels.label import Ids


@dataclass(slots=True)
class Group:
    """Units that compete with each other.

    ``units`` are component numbers in the order of their first channel. ``classes`` [units] states which units may
    stand in for each other: a removal takes the same share from every class, so a group is pruned in ``steps`` equal
    steps. ``kind`` is "heads" when a unit stands for whole rows of a grid (heads, convolution groups), else "channels";
    a group is ``covered`` where such rows are pruned in its place.
    """

    id: int
    units: Ids
    classes: Ids
    steps: int
    kind: str = "channels"
    prunable: bool = True
    covered: bool = False
    barriers: list[int] = field(default_factory=list)
    births: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    children: list[int] = field(default_factory=list)
    exact: bool = True

    @property
    def size(self) -> int:
        """Number of units."""
        return int(self.units.size)


@dataclass(slots=True)
class Units:
    """Components of atoms and their groups.

    ``component`` [atoms]; ``frozen`` [components]; ``group_of`` [components], -1 where a component may not be removed.
    """

    component: Ids
    frozen: NDArray[np.bool_]
    barrier_of: Ids
    group_of: Ids
    groups: list[Group]
    atoms: Atoms

    def close(self, removed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Add to ``removed`` [components] the cells of removed rows, and rows without remaining cells."""
        removed = removed.copy()
        before = -1
        while before != (before := int(removed.sum())):
            for rows in reversed(self.atoms.rows):
                above, cells = self.component[rows.rows], self.component[rows.cells]
                removed[cells[removed[above]].ravel()] = True
                removed[above[removed[cells].all(axis=1)]] = True
        return removed


def views_of(atoms: Atoms, component: Ids) -> list[Ids]:
    """Return every grid as rows of components, each once; for rows removed as a whole, the axis of rows counts."""
    ids_by_view: dict[tuple[tuple[int, ...], bytes], Ids] = {}
    for label in atoms.views.values():
        ids, axes, pack = component[label.ids], list(label.axes), label.pack
        while len(axes) > 1 and (ids == ids.take([0], axis=pack)).all():
            ids = ids.take([0], axis=pack)
            axes.remove(pack)
            pack = axes[-1]
        if len(axes) > 1:
            rows = np.moveaxis(ids, pack, -1).reshape(-1, ids.shape[pack])
            ids_by_view.setdefault((rows.shape, rows.tobytes()), rows)
    return list(ids_by_view.values())


def _counts(rows: Ids, values: Ids) -> dict[int, Ids]:
    """Count each value of ``values`` (same shape as ``rows``) per row: {value: [rows]}."""
    return {int(v): (values == v).sum(axis=1) for v in np.unique(values)}


def link(group_of: Ids, views: list[Ids], frozen: NDArray[np.bool_]) -> tuple[Ids, set[int]]:
    """Link groups that fill the rows of a grid unequally: they are pruned together, or not at all if any is frozen."""
    group_of = group_of.copy()
    blocked: set[int] = set()
    for view in views:
        uneven_groups = [g for g, c in _counts(view, group_of[view]).items() if (c != c[0]).any()]
        if not uneven_groups:
            continue
        real = [g for g in uneven_groups if g >= 0]
        for other in real[1:]:
            group_of[group_of == other] = real[0]
            if other in blocked:
                blocked.add(real[0])
        if real and -1 in uneven_groups:
            blocked.add(real[0])
    return group_of, blocked


def classes_of(units: Ids, views: Sequence[Ids]) -> Ids:
    """Return the class of every unit: units in the same rows of every grid may stand in for each other."""
    keys = np.zeros(units.size, dtype=np.uint64)
    order = np.argsort(units)
    for number, view in enumerate(views):
        where = _place(units, order, view)
        is_member = where >= 0
        if is_member.any():
            rows = np.broadcast_to(np.arange(len(view))[:, None] + (number + 1) * 1_000_003, view.shape)
            np.add.at(keys, where[is_member], mix(rows[is_member]))
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _place(values: Ids, order: Ids, ids: Ids) -> Ids:
    """Return the index in ``values`` (sorted by ``order``) of each of ``ids``, -1 where absent."""
    places = np.minimum(np.searchsorted(values, ids, sorter=order), values.size - 1)
    place = order[places]
    return np.where(values[place] == ids, place, -1)


FEW = 4
"""Number of heads below which one is a large share."""
QUERIES = "queries"
"""The axis of small ratios: heads of queries where there are few of keys and values, else ``head_dim``."""


def choose_rows(units: Units, views: Mapping[int, Sequence[Ids]], axis: str = "head_dim") -> None:
    """Choose between the cells and the rows of a grid where both could be pruned.

    Args:
        units: components and groups; ``prunable`` and ``children`` of the groups are filled in.
        views: the grids that each group's units appear in.
        axis: ``head_dim``: rows (heads) are pruned only where the cells beneath them cannot be; ``heads``: wherever
            they can be, in place of the cells; ``both``: rows, and cells of the remaining rows. Of fewer than four rows
            that hold cells of their own, :data:`QUERIES` prunes cells that are rows themselves instead, else it is
            ``head_dim``.
    """
    children_of, blocked = _children(units)
    rows_by_group = defaultdict[int, list[int]](list)
    for number, rows in enumerate(units.atoms.rows):
        for child in np.unique(units.group_of[units.component[rows.cells]]):
            rows_by_group[int(child)].append(number)
    for parent, children in children_of.items():
        real, group = {c for c in children if c >= 0}, units.groups[parent]
        group.children = sorted(real)
        cells_work = (
            parent not in blocked and real and all(units.groups[c].prunable for c in real) and -1 not in children
        )
        # Of few rows each is a large share: heads of queries, or channels, go rather than one of two heads of keys.
        if axis == QUERIES and group.size < FEW and real:
            cells_work = all(units.groups[c].prunable for c in real)
        is_covered = any(units.groups[c].covered for c in real)
        group.prunable &= not (is_covered or (cells_work and axis in ("head_dim", QUERIES)))
        group.prunable = group.prunable and _can_go_whole(units, group, views, rows_by_group)
        if group.prunable and not (cells_work and axis == "both"):
            for c in real:
                units.groups[c].prunable, units.groups[c].covered = False, True


def _children(units: Units) -> tuple[dict[int, set[int]], set[int]]:
    """Return the groups of cells beneath every group of rows, and the groups of rows that hold cells of their own."""
    children_of: dict[int, set[int]] = defaultdict(set)
    blocked: set[int] = set()
    for rows in units.atoms.rows:
        parents = units.group_of[units.component[rows.rows]]
        children = units.group_of[units.component[rows.cells]]
        for parent in np.unique(parents[parents >= 0]):
            own_children = children[parents == parent]
            children_of[int(parent)].update(int(c) for c in np.unique(own_children) if c != parent)
            if (own_children == parent).any():
                blocked.add(int(parent))
    return children_of, blocked


def _can_go_whole(
    units: Units, group: Group, views: Mapping[int, Sequence[Ids]], rows_by_group: Mapping[int, Sequence[int]]
) -> bool:
    """Return whether each row of every grid over the same cells belongs to one unit of the group, or to none."""
    cells, owners = _cells_with_owners(units, group, rows_by_group)
    order = np.argsort(cells)
    for child in group.children:
        for view in views.get(child, ()):
            if not _same(_owner(cells, owners, order, view)).all():
                return False
        for number in rows_by_group.get(child, ()):
            rows = units.atoms.rows[number]
            owner = _owner(cells, owners, order, units.component[rows.cells])
            is_whole = _same(owner) & (owner[:, 0] >= 0)
            if units.frozen[units.component[rows.rows[is_whole]]].any():
                return False
    return True


def _cells_with_owners(units: Units, group: Group, rows_by_group: Mapping[int, Sequence[int]]) -> tuple[Ids, Ids]:
    """Return components of the cells beneath a group of rows, and the unit that removes each."""
    order = np.argsort(group.units)
    cells, owners = [group.units], [np.arange(group.size)]
    for number in sorted({n for c in group.children for n in rows_by_group.get(c, ())}):
        rows = units.atoms.rows[number]
        place = _place(group.units, order, units.component[rows.rows])
        is_member = place >= 0
        row_cells = units.component[rows.cells[is_member]]
        cells.append(row_cells.ravel())
        owners.append(np.repeat(place[is_member], row_cells.shape[1]))
    unique_cells, first = np.unique(np.concatenate(cells), return_index=True)
    return unique_cells, np.concatenate(owners)[first]


def _owner(cells: Ids, owners: Ids, order: Ids, ids: Ids) -> Ids:
    place = _place(cells, order, ids)
    return np.where(place >= 0, owners[place], -1)


def _same(rows: Ids) -> NDArray[np.bool_]:
    """Return a mask over the rows that hold a single value throughout."""
    return np.asarray((rows == rows[:, :1]).all(axis=1))


# Number of atoms of a birth from which a separate pass over it pays.
_MANY = 64


_SHARED = Barrier(Reason.SHARED, "", "", "all heads share these channels, and whole heads are removed")


def resolve(atoms: Atoms, axis: str = "head_dim") -> Units:
    """Resolve units and groups of a ledger; ``axis``: see ``choose_rows``.

    Grids whose rows share something by column lose whole columns. They lose whole rows where no column can be removed,
    or where rows are asked for, and only if some can be.
    """
    units = _resolve(atoms.settled()[0], axis)
    joined_rows = {k for k, item in enumerate(atoms.columns) if axis == "heads" or _are_stuck(units, item.columns)}
    if not joined_rows:
        return units
    ledger, rows = atoms.settled(joined_rows, _SHARED)
    other = _resolve(ledger, axis)
    free = {k for k, ids in rows.items() if _can_differ(other, ids)}
    if free != joined_rows:
        other = _resolve(atoms.settled(free, _SHARED)[0], axis) if free else units
    return other if _num_removable(other, axis) > _num_removable(units, axis) else units


def _can_differ(units: Units, rows: Ids) -> bool:
    """Return whether some row of a grid can be removed without another."""
    components = np.unique(units.component[rows])
    return components.size > 1 and bool((units.group_of[components] >= 0).any())


def _num_removable(units: Units, axis: str) -> int:
    """Return the number of units that compete; where rows are asked for, that of rows."""
    return sum(g.size for g in units.groups if g.prunable and (axis != "heads" or g.kind == "heads"))


def _are_stuck(units: Units, columns: Ids) -> bool:
    """Return whether no column can be removed: all are frozen, or tied to each other."""
    components = np.unique(units.component[columns])
    return bool(units.frozen[components].all()) or components.size == 1


def _resolve(atoms: Atoms, axis: str) -> Units:
    """Resolve units and groups, vectorised over atoms."""
    component, count = _components(atoms)
    barrier_of = _spread_barriers(atoms, component, count)
    frozen = barrier_of >= 0
    birth_of = np.repeat(np.arange(len(atoms.births)), [b.stop - b.start for b in atoms.births])
    group_of = _group(component, birth_of, count)
    is_row = np.zeros(count, bool)
    for rows in atoms.rows:
        is_row[component[rows.rows]] = True
    group_of[frozen] = -1
    views = views_of(atoms, component)
    group_of, blocked = link(group_of, views, frozen)
    rows_by_group: dict[int, list[Ids]] = defaultdict(list)
    for view in views:
        for g in np.unique(group_of[view]):
            rows_by_group[int(g)].append(view)
    groups = _groups(component, birth_of, group_of, is_row, rows_by_group, blocked)
    index = np.full(int(group_of.max(initial=-1)) + 1, -1)
    for group in groups:
        index[group_of[group.units[0]]] = group.id
    by_group = {int(index[g]): v for g, v in rows_by_group.items() if g >= 0}
    if groups:
        group_of = np.where(group_of >= 0, index[group_of], -1)
    units = Units(component, frozen, barrier_of, group_of, groups, atoms)
    _mark_approximate(units)
    choose_rows(units, by_group, axis)
    return units


def _components(atoms: Atoms) -> tuple[Ids, int]:
    component, count, edges = _join_births(atoms)
    if edges:
        a, b = (component[np.concatenate(side)] for side in zip(*edges, strict=True))
        joint, count = _join_components(count, a, b)
        component = joint[component]
    if not atoms.rows:
        return component, count
    # Removing a row removes its cells, but not the other way round; rows over the same components are united.
    a = np.concatenate([np.repeat(r.rows, r.cells.shape[1]) for r in atoms.rows])
    b = np.concatenate([r.cells.ravel() for r in atoms.rows])
    while True:
        joint, count = _join_components(count, component[a], component[b], strong=False)
        component = joint[component]
        first, second = _same_rows(atoms, component)
        if not first.size:
            return component, count
        joint, count = _join_components(count, component[first], component[second])
        component = joint[component]


def _join_births(atoms: Atoms) -> tuple[Ids, int, list[tuple[Ids, Ids]]]:
    """Unite whole births first; return their components, the number of these, and the edges that unite anything else.

    Most edges unite whole births, and births are few where atoms are many. A component has the place of its first atom.
    """
    all_atoms, births = np.arange(atoms.count), atoms.births
    numbers = {birth.start: k for k, birth in enumerate(births)}
    root = list(range(len(births)))

    def root_of(ids: Ids) -> int | None:
        k = numbers.get(ids.item(0))
        if k is None or births[k].stop - births[k].start != ids.size:
            return None
        run = all_atoms[births[k].start : births[k].stop]
        if np.count_nonzero(ids == run) != ids.size:
            return None
        while root[k] != k:
            root[k] = k = root[root[k]]
        return k

    other_edges: list[tuple[Ids, Ids]] = []
    for a, b in atoms.edges:
        first = second = None
        if a.size >= _MANY:
            first, second = root_of(a), root_of(b)
        if first is None or second is None:
            other_edges.append((a, b))
        else:
            root[max(first, second)] = min(first, second)
    first_atom = all_atoms.copy()
    for k, birth in enumerate(births):  # a root comes before the atoms that depend on it
        if root[k] != k:
            root[k] = root[root[k]]
            start = births[root[k]].start
            first_atom[birth.start : birth.stop] = all_atoms[start : start + birth.stop - birth.start]
    is_first = first_atom == all_atoms
    return (np.cumsum(is_first) - 1)[first_atom], int(np.count_nonzero(is_first)), other_edges


def _join_components(n: int, a: Ids, b: Ids, strong: bool = True) -> tuple[Ids, int]:
    """Return component [n] of every node and their number; edges from ``a`` to ``b`` lead both ways or one way only."""
    matrix = coo_matrix((np.ones(a.size), (a.astype(np.int32), b.astype(np.int32))), shape=(n, n))
    count, component = connected_components(matrix, directed=not strong, connection="strong")
    return component.astype(np.int64), int(count)


def _same_rows(atoms: Atoms, component: Ids) -> tuple[Ids, Ids]:
    """Return pairs to unite: a row and its only component, or two rows over the same components."""
    if not atoms.rows:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows = np.concatenate([r.rows for r in atoms.rows])
    keys = np.concatenate([mix(component[r.cells]).sum(axis=1) for r in atoms.rows])
    first = np.concatenate([r.cells[:, 0] for r in atoms.rows])
    is_uniform = np.concatenate([(component[r.cells] == component[r.cells[:, :1]]).all(axis=1) for r in atoms.rows])
    _, where, inverse = np.unique(keys, return_index=True, return_inverse=True)
    ours = np.concatenate([rows, rows[is_uniform]])
    theirs = np.concatenate([rows[where[inverse]], first[is_uniform]])
    new = component[ours] != component[theirs]
    return ours[new], theirs[new]


def _spread_barriers(atoms: Atoms, component: Ids, count: int) -> Ids:
    """Return the first barrier of every component, -1 where none; a row whose cells are frozen is frozen with them."""
    barrier = np.full(count, -1, dtype=np.int64)
    for ids, why in reversed(atoms.frozen):
        barrier[component[ids]] = why
    changed = True
    while changed:
        changed = False
        for rows in atoms.rows:
            cells = barrier[component[rows.cells]].max(axis=1)
            row_components = component[rows.rows]
            new = (cells >= 0) & (barrier[row_components] < 0)
            if new.any():
                barrier[row_components[new]] = cells[new]
                changed = True
    return barrier


def _group(component: Ids, birth_of: Ids, count: int) -> Ids:
    """Return the group of every component: components born of the same axes, equally often, compete."""
    keys = np.zeros(count, dtype=np.uint64)
    np.add.at(keys, component, mix(np.arange(int(birth_of.max(initial=-1)) + 1))[birth_of])
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(first.size, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(first.size)
    return rank[inverse]


def _groups(
    component: Ids,
    birth_of: Ids,
    group_of: Ids,
    is_row: NDArray[np.bool_],
    rows_by_group: Mapping[int, list[Ids]],
    blocked: set[int],
) -> list[Group]:
    count = group_of.size
    members = np.flatnonzero(group_of >= 0)
    if not members.size:
        return []
    order = members[np.argsort(group_of[members], kind="stable")]
    first_atom = np.empty(count, np.int64)
    first_atom[component[::-1]] = np.arange(component.size)[::-1]  # of equal ones the last, the first atom, stays
    births_of = _births_of(group_of[component], birth_of)
    groups: list[Group] = []
    bounds = np.flatnonzero(np.diff(group_of[order], prepend=-2))
    for start, stop in zip(bounds, [*bounds[1:], order.size], strict=True):
        units = order[start:stop]
        units = units[np.argsort(first_atom[units], kind="stable")]
        number = int(group_of[units[0]])
        views = rows_by_group.get(number)
        classes = classes_of(units, views) if views else np.zeros(units.size, np.int64)
        sizes = np.bincount(classes)
        steps = int(np.gcd.reduce(sizes))
        kind = "heads" if is_row[units].any() else "channels"
        prunable = steps > 1 and number not in blocked
        groups.append(Group(len(groups), units, classes, steps, kind, prunable, births=births_of[number]))
    return groups


def _births_of(group: Ids, birth_of: Ids) -> dict[int, Ids]:
    """Return the births that the atoms of every group come from."""
    count = int(birth_of.max(initial=0)) + 1
    # Atoms of one birth lie together and mostly belong to one group: only boundaries between groups are sorted.
    change = np.flatnonzero((group[1:] != group[:-1]) | (birth_of[1:] != birth_of[:-1])) + 1
    change = np.concatenate([np.zeros(min(1, group.size), np.int64), change])
    keys = np.unique(group[change] * count + birth_of[change])
    groups, births = np.divmod(keys, count)
    boundaries = np.flatnonzero(np.diff(groups)) + 1
    return {
        int(g[0]): b for g, b in zip(np.split(groups, boundaries), np.split(births, boundaries), strict=True) if g.size
    }


def _mark_approximate(units: Units) -> None:
    for ids, why in units.atoms.approximate:
        for number in np.unique(units.group_of[units.component[ids]]):
            if number >= 0:
                units.groups[number].exact = False
                units.groups[number].barriers.append(why)
