"""The ledger of atoms: births, unions, freezes, and the rows of grids, kept as arrays and resolved once at the end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from onnxprune.labels.label import Ids, Label

_MAX_ATOMS = 1 << 26


class Reason(StrEnum):
    """Codes of the reasons why channels or layers keep their size; plans, JSON and reports hold their values.

    ``onnxprune.report.reasons`` has the words of each. A rule of another package may use a code of its own, any string:
    reports show it as it is.
    """

    # Stated while labels are propagated
    GRAPH_OUTPUT = "graph-output"
    CAPTURED_BY_SUBGRAPH = "captured-by-subgraph"
    NO_RULE = "no-rule"
    DYNAMIC_SHAPE = "dynamic-shape"
    MISSING_CONSTANT = "missing-constant"
    NORMALISED = "normalised"
    FIXED_SIZE = "fixed-size"
    SHARED = "shared"
    HEAD_SIZE = "head-size"
    ROTARY = "rotary"
    SPATIAL = "spatial"
    CACHE = "cache"
    UNLABELLED_OPERAND = "unlabelled-operand"
    UNSUPPORTED_FORM = "unsupported-form"
    # Axes that never were channels: lists of barriers leave them out
    KERNEL = "kernel"
    OPERAND = "operand"
    # Of groups as a whole
    COVERED = "covered"
    TIED_TOGETHER = "tied-together"
    NOT_STORED = "not-stored"
    GRID_UNBALANCED = "grid-unbalanced"
    SINGLE = "single"
    # Asked for by the caller
    EXCLUDED = "excluded"
    KEPT_WHOLE = "kept-whole"
    NO_SCORE = "no-score"


@dataclass(frozen=True, slots=True)
class Barrier:
    """Reason why atoms may not be removed.

    ``code`` is a :class:`Reason` or a string of another package's rule, ``node``/``op`` the place where it arose (""
    for graph inputs and outputs), ``detail`` a sentence, ``channels`` the number of atoms it holds (filled when groups
    are built).
    """

    code: str
    node: str
    op: str
    detail: str
    channels: int = 0


@dataclass(slots=True)
class Birth:
    """A run of atoms born together: on an axis of a constant, or as the rows of a grid."""

    start: int
    stop: int
    tensor: str
    axis: int


@dataclass(slots=True)
class Rows:
    """Row atoms of a grid and the cells beneath each: ``rows`` [n], ``cells`` [n, width]."""

    rows: Ids
    cells: Ids


@dataclass(slots=True)
class Columns:
    """Atoms that stand for the columns of a grid: ``columns`` [width] of the grid ``label``.

    A channel that all rows have in common (the scale of a normalisation within heads, an angle of a rotation) meets the
    grid column by column. Then either whole columns are removed, from every row, or whole rows, and the columns stay.
    Which of them is decided when units are resolved.
    """

    columns: Ids
    label: Label


@dataclass(slots=True)
class Atoms:
    """Ledger of all that rules state about atoms, appended as arrays; nothing is resolved here."""

    count: int = 0
    births: list[Birth] = field(default_factory=list)
    edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    frozen: list[tuple[Ids, int]] = field(default_factory=list)
    approximate: list[tuple[Ids, int]] = field(default_factory=list)
    """Atoms that a normalisation runs over which was opted into."""
    barriers: list[Barrier] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    views: dict[bytes, Label] = field(default_factory=dict)
    columns: list[Columns] = field(default_factory=list)
    _row_of: dict[int, int] = field(default_factory=dict)
    _barrier_index: dict[Barrier, int] = field(default_factory=dict)

    def new(self, n: int, tensor: str, axis: int) -> Ids:
        """Return ``n`` fresh atoms born on ``axis`` of ``tensor``. Raises ValueError where there would be too many."""
        if self.count + n > _MAX_ATOMS:
            raise ValueError(f"an axis of {n:,} channels is more than the analysis can label")
        start, self.count = self.count, self.count + n
        self.births.append(Birth(start, self.count, tensor, axis))
        return np.arange(start, self.count, dtype=np.int64)

    def unite(self, a: Ids, b: Ids) -> None:
        """Tie atoms at the same position of the (broadcast) arrays: they are removed together or not at all."""
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        self.edges.append((a.ravel(), b.ravel()))

    def barrier(self, code: str, node: str, op: str, detail: str) -> int:
        """Return the index of the barrier with these fields, new or known."""
        barrier = Barrier(code, node, op, detail)
        index = self._barrier_index.setdefault(barrier, len(self.barriers))
        if index == len(self.barriers):
            self.barriers.append(barrier)
        return index

    def freeze(self, ids: Ids, barrier: int) -> None:
        """Forbid the removal of these atoms, for the reason at index ``barrier``."""
        if ids.size:
            self.frozen.append((ids.ravel(), barrier))

    def with_frozen(self, freezes: Sequence[tuple[Ids, Barrier]]) -> Atoms:
        """Return a ledger in which more atoms are frozen; this one is not changed.

        Args:
            freezes: pairs of atoms and the barrier that freezes them.
        """
        other = replace(
            self, frozen=list(self.frozen), barriers=list(self.barriers), _barrier_index=dict(self._barrier_index)
        )
        for ids, why in freezes:
            other.freeze(ids, other.barrier(why.code, why.node, why.op, why.detail))
        return other

    def view(self, label: Label) -> None:
        """Record that a tensor has this grid, so that a removal must leave it a grid."""
        if label.is_grid:
            key = label.ids.shape, label.pack, label.ids.tobytes()
            self.views.setdefault(repr(key[:2]).encode() + key[2], label)

    def rows_of(self, label: Label) -> Label:
        """Return the grid's rows as atoms of their own: a row atom is removed exactly when all cells of its row are.

        Rows with the same cells, in any order and tensor, share one row atom; a row that repeats one atom has that
        atom. Shape: the label's with size 1 on its pack axis.
        """
        ids, pack = label.ids, label.pack
        first = ids.take([0], axis=pack)
        other_axes = [a for a in label.axes if a != pack]
        outer_pack = other_axes[-1] if other_axes else pack
        if (ids == first).all():
            return Label(first, outer_pack)
        keys = np.add.reduce(mix(ids), axis=pack, keepdims=True)
        unique, where, inverse = np.unique(keys.ravel(), return_index=True, return_inverse=True)
        cells = np.moveaxis(ids, pack, -1).reshape(-1, ids.shape[pack])
        known = [self._row_of.get(k, -1) for k in unique.tolist()]
        numbers = np.array(known, dtype=np.int64)
        new_columns = np.flatnonzero(numbers < 0)
        if new_columns.size:
            fresh = self.new(new_columns.size, "", label.pack)
            numbers[new_columns] = fresh
            self._row_of.update(zip(unique[new_columns].tolist(), fresh.tolist(), strict=True))
            self.rows.append(Rows(fresh, cells[where[new_columns]]))
        result = Label(numbers[inverse].reshape(first.shape), outer_pack)
        self.view(result)
        return result

    def project(self, label: Label, axes: tuple[int, ...]) -> Ids:
        """Reduce the label to some of its axes: cells tie across rows, or rows stand for their cells.

        Dropping outer axes while the pack axis stays ties the cells of a column together; dropping the pack axis
        replaces rows by their row atoms.
        """
        while label.axes != axes:
            removed_axes = [a for a in label.axes if a not in axes]
            if label.pack in axes:
                ids = label.ids
                for axis in removed_axes:
                    ids = ids.take([0], axis=axis)
                self.unite(label.ids, np.broadcast_to(ids, label.ids.shape))
                return ids
            if label.axes == (label.pack,):
                return label.ids.take([0], axis=label.pack)
            label = self.rows_of(label)
        return label.ids

    def on_axes(self, label: Label, axes: tuple[int, ...]) -> Ids:
        """Reduce a label to some of its axes where something common to all rows meets it, see :class:`Columns`."""
        first = label.ids
        for axis in label.outer():
            first = first.take([0], axis=axis)
        if axes != (label.pack,) or not label.is_grid or (label.ids == first).all():
            return self.project(label, axes)
        for known in self.columns:
            if known.label is label:
                return known.columns.reshape(first.shape)
        columns = self.new(first.size, "", label.pack)
        self.columns.append(Columns(columns, label))
        return columns.reshape(first.shape)

    def settled(self, joined_rows: Collection[int] = (), why: Barrier | None = None) -> tuple[Atoms, dict[int, Ids]]:
        """Return a ledger in which rows or columns of every grid are decided on; this one is not changed.

        Args:
            joined_rows: indices of ``columns`` whose grids lose whole rows; those of others lose whole columns.
            why: barrier of columns that stay.

        Returns:
            the ledger, and the atoms of the rows by index.
        """
        if not self.columns:
            return self, {}
        other = replace(self, edges=list(self.edges))
        if joined_rows:
            other.births, other.frozen, other.rows = list(self.births), list(self.frozen), list(self.rows)
            other.views, other._row_of = dict(self.views), dict(self._row_of)
            other.barriers, other._barrier_index = list(self.barriers), dict(self._barrier_index)
        rows: dict[int, Ids] = {}
        for k, item in enumerate(self.columns):
            if k not in joined_rows or why is None:
                shape = [1] * item.label.ids.ndim
                shape[item.label.pack] = item.columns.size
                other.unite(item.label.ids, item.columns.reshape(shape))
                continue
            rows[k] = other.rows_of(item.label).ids
            other.unite(item.label.ids, np.broadcast_to(rows[k], item.label.ids.shape))
            other.freeze(item.columns, other.barrier(why.code, why.node, why.op, why.detail))
        return other, rows

    def couple(self, label: Label) -> None:
        """Tie the columns of the grid: every row loses the same positions."""
        if label.is_grid:
            self.project(label, (label.pack,))

    def fix_axis(self, label: Label, axis: int, barrier: int) -> None:
        """Keep the size of ``axis`` and the meaning of its positions.

        On a single axis this freezes the atoms. On a grid's pack axis cells are removed only with their whole row; on
        an outer axis the rows stay, and cells may still be removed.
        """
        if label.axes == (axis,):
            self.freeze(label.ids, barrier)
        elif axis == label.pack:
            rows = self.rows_of(label)
            self.unite(label.ids, np.broadcast_to(rows.ids, label.ids.shape))
        elif axis in label.axes:
            self.fix_axis(self.rows_of(label), axis, barrier)


def mix(ids: Ids) -> NDArray[np.uint64]:
    """Hash every atom to 64 well-spread bits (splitmix64's finaliser); a sum of hashes names a set of atoms."""
    with np.errstate(over="ignore"):
        x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))
