"""Operators that gather and scatter by index.

A known index is renumbered where it addresses channels, and loses the entries of removed channels. A computed index
passes channels where it has the same channels itself: Expand or Tile repeated it over them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Node
from onnxprune.labels import algebra
from onnxprune.labels.algebra import Shape as AxisSizes
from onnxprune.labels.algebra import align, broadcast
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import Label, Labels, along, covering
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.factoring import Embedding
from onnxprune.operators.operands import (
    Values,
    axis_of,
    read_integers,
    require_integers,
    require_value,
    where_known,
    whole_numbers,
)
from onnxprune.operators.registry import Move, Read, Rule, WithoutAddends, register, with_facts


class Gather(Rule):
    """Positions selected by an index tensor, known or computed."""

    moves = Move.SELECT

    def propagate(self, step: Step) -> None:
        """Select positions for a known scalar or list; freeze the axis for an unknown index."""
        labels, axis = step.labels(0), step.axis()
        rank = len(step.shape(1))
        index = step.table.facts.static_value(step.node.inputs[1])
        if step.may_lose_rows(0):
            labels = step.without_rows(labels, axis)
        elif covering(labels, axis) is not None and (index is None or rank > 1):
            labels = step.drop_axis(labels, axis, Reason.FIXED_SIZE, "positions of this axis are looked up by index")
        elif index is not None and covering(labels, axis) is not None:
            labels = step.take(labels, axis, np.atleast_1d(index).astype(np.int64) % step.shape(0)[axis])
        step.set(0, self._place(labels, axis, rank))

    @staticmethod
    def _place(labels: Labels, axis: int, rank: int) -> Labels:
        """Replace the axis by the index's own axes."""
        if rank == 0:
            return algebra.remove_axis(labels, axis)
        for _ in range(rank - 1):
            labels = algebra.insert_axis(labels, axis + 1)
        return labels

    def rewrite(self, cut: Cut) -> None:
        """Renumber the indices and drop those of removed channels."""
        axis = cut.before.axis()
        keep = cut.keep(cut.node.inputs[0], axis)
        index = cut.before.value(1)
        if keep is None or keep.all() or index is None:
            return
        flat = index.astype(np.int64) % keep.size
        if index.ndim:
            flat = flat[keep[flat]]
        new = (np.cumsum(keep) - 1)[flat]
        if not np.array_equal(new, index):
            cut.set_input(1, np.asarray(new, dtype=index.dtype))

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the data's shape with the index's axes in place of the gathered one."""
        axis = axis_of(node.attrs.get("axis", 0), len(shapes[0]))
        return [(*shapes[0][:axis], *shapes[1], *shapes[0][axis + 1 :])]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's take."""
        return require_value(values, 0).take(
            require_value(values, 1).astype(np.int64, copy=False), axis=node.attrs.get("axis", 0)
        )

    def picks(self, node: Node, rank: int) -> tuple[int, int, int] | None:
        """Return the index and the data with the axis."""
        return 1, 0, int(node.attrs.get("axis", 0)) % rank

    def lookups(self, node: Node) -> Sequence[tuple[int, int]]:
        """Return the index and the data, where rows are picked."""
        return ((1, 0),) if node.attrs.get("axis", 0) == 0 else ()

    def index_limit(self, node: Node, i: int, shapes: Sequence[Any], read: Read) -> int | None:
        """Return the size of the gathered axis."""
        return None if i != 1 or shapes[0] is None else shapes[0][node.attrs.get("axis", 0)]


class Shape(Rule):
    """Sizes of a tensor; the engine tracks the consumers of sizes."""

    reads_sizes = True

    def propagate(self, step: Step) -> None:
        """Leave the output unlabelled."""
        step.labels(0)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return one number per requested axis, or a single one for the number of elements."""
        return [(len(self._part(node, shapes[0])),)]

    def size_values(self, node: Node, shape: Sequence[int | None]) -> NDArray[Any] | None:
        """Return the requested sizes."""
        part = self._part(node, shape)
        return None if None in part else np.asarray(part, dtype=np.int64)

    @staticmethod
    def _part(node: Node, shape: Sequence[int | None]) -> Sequence[int | None]:
        return shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))]


class Size(Shape):
    """The number of elements of a tensor."""

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the shape of one number."""
        return [()]

    def size_values(self, node: Node, shape: Sequence[int | None]) -> NDArray[Any] | None:
        """Return the product of the sizes."""
        return None if None in shape else np.asarray(math.prod(cast("Sequence[int]", shape)), dtype=np.int64)


class Fill(Rule):
    """A tensor of one repeated value, of any size: its axes get atoms of their own, like those of a constant."""

    operands = targets = (0,)
    makes_labels = True

    def propagate(self, step: Step) -> None:
        """Create atoms for every static axis."""
        shape, name = step.out_shape(), step.node.outputs[0]
        result: Labels = ()
        if np.asarray(step.attr("value", np.zeros(1, np.float32))).dtype.kind in "iub":
            return  # sizes and masks
        for axis, n in enumerate(shape):
            if n is not None and n > 1 and not step.table.facts.varies(name, axis):
                result = (*result, along(step.atoms.new(n, name, axis), axis, len(shape)))
        step.set(0, result)

    def rewrite(self, cut: Cut) -> None:
        """Write the new sizes into the shape operand."""
        target, new = cut.value(0), cut.out_shape()
        if None not in new and (target is None or tuple(target.tolist()) != new):
            cut.set_target(0, new)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the value of the shape operand."""
        return [tuple(require_integers(read_integers(node, values, 0, "", 1)))]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Fill an array with the value."""
        fill = node.attrs.get("value", np.zeros(1, np.float32))
        return np.full(whole_numbers(require_value(values, 0)), np.ravel(fill)[0], dtype=fill.dtype)


class Unlabelled(Rule):
    """Indices or numbers computed from tensors that have no channels."""

    def propagate(self, step: Step) -> None:
        """Freeze every input with channels."""
        for i in range(len(step.node.inputs)):
            step.freeze(step.labels(i), Reason.FIXED_SIZE, f"{step.node.op} depends on the size of its input")


class OneHot(Unlabelled):
    """Rows of 0 with a 1 at an index."""

    def index_limit(self, node: Node, i: int, shapes: Sequence[Any], read: Read) -> int | None:
        """Return the depth."""
        depth = read(1) if i == 0 else None
        return None if depth is None else int(depth.ravel()[0])


class Range(Unlabelled):
    """Numbers from a start to an end."""

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the number of steps."""
        start, end, step = (float(require_value(values, i).item()) for i in range(3))
        return [(max(math.ceil((end - start) / step), 0),)]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's arange, in the start's type."""
        start, end, step = (require_value(values, i) for i in range(3))
        return np.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


class Trilu(Rule):
    """Upper or lower triangle of the last two axes."""

    def propagate(self, step: Step) -> None:
        """Pass the batch axes."""
        labels, rank = step.labels(0), len(step.shape(0))
        for axis in (rank - 2, rank - 1):
            labels = step.drop_axis(labels, axis, Reason.FIXED_SIZE, "a triangle of this axis is taken")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Any], values: Any) -> list[Any] | None:
        """Return the data's shape."""
        return [shapes[0]]


register("", "Gather", rule=with_facts(Gather(), factoring=Embedding()))
register("", "Shape", rule=Shape())
register("", "Size", rule=Size())
register("", "ConstantOfShape", rule=Fill())
register("", "Range", rule=Range())
register("", "NonZero", "NonMaxSuppression", "Unique", rule=with_facts(Unlabelled(), jumps=True, sized_by_values=True))
register("", "EyeLike", rule=Unlabelled())
register("", "OneHot", rule=OneHot())
register("", "Trilu", rule=Trilu())


Index = NDArray[np.int64]
_BY_INDEX = "positions of this axis are addressed by a computed index"


def _known(step: Step, i: int) -> Index | None:
    """Return an index whose value is equal at every size of the inputs, else None."""
    value = step.table.facts.static_value(step.node.inputs[i])
    return None if value is None else value.astype(np.int64)


def _only_axis(values: Index) -> int | None:
    """Return the only axis that an array varies along, -1 for a constant array, None for several axes."""
    varying_axes = [a for a in range(values.ndim) if (values != values.take([0], axis=a)).any()]
    return None if len(varying_axes) > 1 else varying_axes[0] if varying_axes else -1


def _line(values: Index, axis: int) -> Index | None:
    """Return the array along one axis, where it is constant along all others, else None."""
    if not values.size or _only_axis(values) not in (axis, -1):
        return None
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)[:, 0]


def _renumbered(values: Index, keep: NDArray[np.bool_] | None) -> Index:
    """Renumber positions along an axis to the survivors; removed positions must not occur."""
    return values if keep is None else np.asarray((np.cumsum(keep) - 1)[values % keep.size])


class _Elements(Rule):
    """GatherElements and ScatterElements: the index has the rank of the data and shares all axes but one with it."""

    beside: int
    """Position of the tensor with one element per entry of the index; -1 for the output."""

    def _beside(self, cut: Cut) -> str:
        return cut.node.outputs[0] if self.beside < 0 else cut.node.inputs[self.beside]

    @staticmethod
    def _parted(step: Step, labels: Labels, axis: int, line: Index | None) -> Labels:
        """Drop a label whose grid spans the indexed axis, and any label of that axis where positions are not known."""
        label = covering(labels, axis)
        if label is not None and (line is None or label.is_grid):
            labels = step.drop_axis(labels, axis, Reason.FIXED_SIZE, _BY_INDEX)
        return labels

    @staticmethod
    def _first(step: Step, labels: Labels, axis: int, sizes: tuple[int, ...]) -> Labels:
        """Return labels of the leading positions of all axes but the indexed one, which has none."""
        labels = tuple(x for x in labels if x.ids.shape[axis] == 1)
        for a, n in enumerate(step.shape(0)):
            if a != axis and n != sizes[a]:
                labels = step.take(labels, a, np.arange(sizes[a]))
        return labels

    @staticmethod
    def _met(step: Step, operands: list[Labels], axis: int) -> Labels:
        """Unite labels beside the indexed axis; a known index is broadcast with the operands."""
        sizes = step.shape(1)
        index = step.drop_axis(step.labels(1), axis, Reason.FIXED_SIZE, "an index along this axis")
        known = _known(step, 1) is not None
        index_shape = tuple(
            1 if a == axis or (known and covering(index, a) is None) else n for a, n in enumerate(sizes)
        )
        full_shape = tuple(1 if a == axis else n for a, n in enumerate(sizes))
        return broadcast(
            step.atoms, [*((x, full_shape) for x in operands), (index, index_shape)], len(sizes), step.reason
        )

    def picks(self, node: Node, rank: int) -> tuple[int, int, int] | None:
        """Return the index and the data with the axis."""
        return 1, 0, int(node.attrs.get("axis", 0)) % rank

    def rewrite(self, cut: Cut) -> None:
        """Drop entries of removed channels from a known index and renumber it along its axis."""
        old = _known(cut.before, 1)
        if old is None:
            return
        axis = cut.before.axis()
        new = _renumbered(cut.survivors(self._beside(cut), old), cut.keep(cut.node.inputs[0], axis))
        value = cut.value(1)
        if value is None or not np.array_equal(new, value):
            cut.set_input(1, new.astype(cut.before.value(1).dtype))  # type: ignore[union-attr]


class GatherElements(_Elements):
    """One element of the data per entry of the index."""

    chooses = True

    beside = -1

    def propagate(self, step: Step) -> None:
        """Select positions that are equal for all other axes; pass the other axes."""
        axis, index = step.axis(), _known(step, 1)
        line = None if index is None else _line(index, axis)
        data = step.without_rows(step.labels(0), axis) if step.may_lose_rows(0) else step.labels(0)
        labels = self._parted(step, data, axis, line)
        selected: Labels = ()
        if line is not None:
            label = covering(labels, axis)
            selected = step.take(() if label is None else (label,), axis, line % step.shape(0)[axis])
        other_labels = self._first(step, labels, axis, step.shape(1))
        step.set(0, (*self._met(step, [other_labels], axis), *selected))

    def index_limit(self, node: Node, i: int, shapes: Sequence[Any], read: Read) -> int | None:
        """Return the size of the axis that is gathered from."""
        return None if i != 1 or shapes[0] is None else shapes[0][node.attrs.get("axis", 0)]


class ScatterElements(_Elements):
    """One element written per entry of the index, replacing the old value or reduced with it."""

    chooses = True
    caches = ((0, 0),)

    beside = 2

    def propagate(self, step: Step) -> None:
        """Tie written channels to those of the updates; unite the other axes of all three operands."""
        axis, index = step.axis(), _known(step, 1)
        line, rows = None if index is None else _line(index, axis), covering(step.labels(0), axis)
        if step.may_lose_rows(0) and rows is not None and not rows.is_grid:
            others = (*(x for x in step.labels(0) if x is not rows), *step.labels(1), *step.labels(2))
            step.freeze(others, Reason.FIXED_SIZE, "positions beside those that are written by index")
            step.set(0, (rows,))
            return
        data = self._parted(step, step.labels(0), axis, line)
        updates = self._parted(step, step.labels(2), axis, line)
        if line is not None:
            target = step.axis_ids(data, axis)
            written_ids = None if target is None else target[line % target.size]
            step.unite(written_ids, step.axis_ids(updates, axis), "the written values")
        other_labels = tuple(x for x in updates if x.ids.shape[axis] == 1)
        self._met(step, [self._first(step, data, axis, step.shape(2)), other_labels], axis)
        step.set(0, data)

    def addends(self, node: Node) -> Sequence[int]:
        """Return the data and the updates that are added to them."""
        return (0, 2) if node.attrs.get("reduction", "none") == "add" else ()

    def without(self, node: Node, positions: Collection[int], opset: int) -> WithoutAddends | None:
        """Return the data where nothing is added to them."""
        return WithoutAddends([], {node.outputs[0]: node.inputs[0]}) if 0 not in positions else None

    def infer(self, node: Node, shapes: list[Any], values: Any) -> list[Any] | None:
        """Return the data's shape."""
        return [shapes[0]] if len(node.outputs) == 1 else None


class Columns:
    """The addressed positions of a known index [..., depth], by addressed axis.

    ``axes``: per addressed axis, the index axis along which its positions vary, shared with no other addressed axis; -1
    for a constant position; None otherwise.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        axes = [_only_axis(index[..., k]) for k in range(index.shape[-1])]
        index_axes = [a for k in range(index.shape[-1]) for a in range(index.ndim - 1) if self._varies(k, a)]
        self.axes = [None if a is not None and a >= 0 and index_axes.count(a) > 1 else a for a in axes]
        self.computed = False

    @classmethod
    def at_every(cls, values: list[Index]) -> Columns:
        """Return columns of an index that follows the sizes of the inputs, restricted to values equal at all probes."""
        first, *others = (cls(v) for v in values)
        first.computed = any(not np.array_equal(values[0], v) for v in values[1:])
        for k, axis in enumerate(first.axes):
            if axis is not None and any(
                other.axes[k] != axis or not np.array_equal(other.raw(k), first.raw(k)) for other in others
            ):
                first.axes[k] = None
        return first

    def _varies(self, k: int, axis: int) -> bool:
        column = self.index[..., k]
        return bool((column != column.take([0], axis=axis)).any())

    def raw(self, k: int) -> Index:
        """Return the stored positions along addressed axis ``k``: one per entry of the index's axis."""
        axis, column = self.axes[k], self.index[..., k]
        line = column.ravel()[:1] if axis is None or axis < 0 else _line(column, axis)
        assert line is not None
        return line

    def line(self, k: int, size: int) -> Index:
        """Return positions along addressed axis ``k``, all counted from the front."""
        return self.raw(k) % size

    def addressed(self, k: int, size: int) -> Index:
        """Return every distinct position along addressed axis ``k``."""
        return np.unique(self.index[..., k] % size)

    def cut(self, cut: Cut, beside: str, first: int) -> Index:
        """Slice and renumber the index: ``beside`` has its leading axes; it addresses data from axis ``first`` on."""
        index = self.index
        for axis in range(index.ndim - 1):
            keep = cut.keep(beside, axis)
            if keep is not None:
                index = index.compress(keep, axis=axis)
        columns = [_renumbered(index[..., k], cut.keep(cut.node.inputs[0], first + k)) for k in range(index.shape[-1])]
        return np.stack(columns, axis=-1)

    def move(self, cut: Cut, beside: str, first: int) -> None:
        """Insert nodes that convert a computed index as ``cut`` does: they drop entries and shift positions."""
        masks = [cut.keep(beside, axis) for axis in range(self.index.ndim - 1)]
        for axis, keep in enumerate(masks):
            if keep is not None:
                cut.pick(1, axis, np.flatnonzero(keep))
        for k, data_axis in enumerate(self.axes):
            mask, line = cut.keep(cut.node.inputs[0], first + k), self.raw(k)
            if mask is None or data_axis is None:
                continue
            keep = None if data_axis < 0 else masks[data_axis]
            line = line if keep is None else line[keep]
            shift = np.zeros(
                (*(line.size if a == data_axis else 1 for a in range(len(masks))), len(self.axes)), np.int64
            )
            shift[..., k] = (_renumbered(line, mask) - line).reshape(shift.shape[:-1])
            cut.add(1, shift)


def _columns(step: Step) -> Columns | None:
    values = [probe.values.get(step.node.inputs[1]) for probe in step.table.facts.probes]
    known = [v.astype(np.int64) for v in values if v is not None and v.size and v.ndim == len(step.shape(1))]
    return Columns.at_every(known) if known and len(known) == len(values) else None


class _Slices(Rule):
    """GatherND and ScatterND: an index [..., depth] addresses the leading axes of the data; the trailing axes pass."""

    def _addressed(self, step: Step, labels: Labels, columns: Columns | None, first: int, k: int) -> Labels:
        """Drop labels of addressed axis ``k`` where it, or single positions of it, cannot be pruned."""
        axis = first + k
        label = covering(labels, axis)
        if label is None:
            return labels
        if columns is None or label.is_grid or (columns.computed and columns.axes[k] is None):
            return step.drop_axis(labels, axis, Reason.FIXED_SIZE, _BY_INDEX)
        if columns.axes[k] is None:
            ids = label.ids.ravel()[columns.addressed(k, label.ids.size)]
            step.atoms.freeze(ids, step.reason(Reason.FIXED_SIZE, "positions of this axis are addressed one by one"))
        return labels

    def _rewrite(self, cut: Cut, beside: str, first: int) -> None:
        columns = _columns(cut.before)
        if columns is None:
            return
        new, value = columns.cut(cut, beside, first), cut.value(1)
        if value is not None and np.array_equal(new, value):
            return
        if not columns.computed:
            cut.set_input(1, new)  # of the one type that these operators take
        elif value is None or not np.array_equal(value, columns.index):
            cut.fail("its index is computed from sizes that change with pruning")
        else:
            columns.move(cut, beside, first)


class GatherND(_Slices):
    """Slices looked up by index."""

    chooses = True

    def propagate(self, step: Step) -> None:
        """Select known positions along an axis of their own; freeze a single addressed position."""
        labels, columns = step.labels(0), _columns(step)
        batch, depth = int(step.attr("batch_dims", 0)), step.shape(1)[-1]
        first, rank = batch + depth, len(step.out_shape())
        shift = len(step.shape(1)) - 1 - first
        for axis in range(batch):
            labels = step.drop_axis(labels, axis, Reason.FIXED_SIZE, "a batch axis of the table")
        result: Labels = ()
        for k in range(depth):
            labels = self._addressed(step, labels, columns, batch, k)
            label = covering(labels, batch + k)
            if label is not None:
                result = (*result, *self._picked(step, label, columns, batch + k, k, rank))
        for label in labels:
            if min(label.axes) >= first:
                ids = label.ids.reshape((1,) * (first + shift) + label.ids.shape[first:])
                result = (*result, Label(ids, label.pack + shift))
        step.set(0, result)

    @staticmethod
    def _picked(step: Step, label: Label, columns: Columns | None, axis: int, k: int, rank: int) -> Labels:
        """Return the output axis of the selected positions of a data axis; freeze a single addressed position."""
        if columns is None or columns.axes[k] is None:
            return ()
        target = columns.axes[k]
        line = columns.line(k, label.ids.size)
        step.take((label,), axis, line)  # a single one is frozen
        return () if target is None or line.size < 2 else (along(label.ids.ravel()[line], target, rank),)

    def rewrite(self, cut: Cut) -> None:
        """Drop entries of removed channels from a known index and renumber it."""
        self._rewrite(cut, cut.node.outputs[0], int(cut.attr("batch_dims", 0)))

    def index_limit(self, node: Node, i: int, shapes: Sequence[Any], read: Read) -> int | None:
        """Return the smallest size of the axes that are gathered from."""
        if i != 1 or None in shapes[:2] or shapes[1][-1] is None:
            return None
        first = node.attrs.get("batch_dims", 0)
        sizes = [n for n in shapes[0][first : first + shapes[1][-1]] if n is not None]
        return min(sizes, default=None)


class ScatterND(_Slices):
    """Slices written into a tensor, replacing the old values or reduced with them."""

    chooses = True
    caches = ((0, 0),)

    def propagate(self, step: Step) -> None:
        """Tie written channels to those of the updates; unite the axes behind the addressed ones."""
        data, updates, columns = step.labels(0), step.labels(2), _columns(step)
        depth, num_batch, rank = step.shape(1)[-1], len(step.shape(1)) - 1, len(step.shape(0))
        if any(
            x.is_grid and min(x.axes) < at <= max(x.axes)
            for part, at in ((data, depth), (updates, num_batch))
            for x in part
        ):
            step.freeze((*data, *updates), Reason.UNSUPPORTED_FORM, "a grid is written by index")
            return
        written_axes = set()
        for k in range(depth):
            data = self._addressed(step, data, columns, 0, k)
            target = covering(data, k)
            if target is None or columns is None or columns.axes[k] is None:
                continue
            axis = columns.axes[k]
            addressed_ids = target.ids.ravel()[columns.line(k, target.ids.size)]
            update_ids = None if axis is None or axis < 0 else step.axis_ids(updates, axis)
            step.unite(addressed_ids, update_ids, "the written values")
            written_axes.add(axis)
        for axis in range(num_batch):
            if axis not in written_axes:
                updates = step.drop_axis(
                    updates, axis, Reason.FIXED_SIZE, "positions of this axis are written by index"
                )
        parts = [
            (self._behind(x, at), s[at:])
            for x, at, s in ((data, depth, step.shape(0)), (updates, num_batch, step.shape(2)))
        ]
        trailing = broadcast(step.atoms, parts, rank - depth, step.reason)
        step.set(0, (*(x for x in data if max(x.axes) < depth), *align(trailing, depth)))

    @staticmethod
    def _behind(labels: Labels, at: int) -> Labels:
        """Return the labels of the axes from ``at`` on."""
        return tuple(Label(x.ids.reshape(x.ids.shape[at:]), x.pack - at) for x in labels if min(x.axes) >= at)

    def rewrite(self, cut: Cut) -> None:
        """Drop entries of removed channels from a known index and renumber it."""
        self._rewrite(cut, cut.node.inputs[2], 0)

    def addends(self, node: Node) -> Sequence[int]:
        """Return the data and the updates that are added to them."""
        return (0, 2) if node.attrs.get("reduction", "none") == "add" else ()

    def without(self, node: Node, positions: Collection[int], opset: int) -> WithoutAddends | None:
        """Return the data where nothing is added to them."""
        return WithoutAddends([], {node.outputs[0]: node.inputs[0]}) if 0 not in positions else None

    def infer(self, node: Node, shapes: list[Any], values: Any) -> list[Any] | None:
        """Return the data's shape."""
        return [shapes[0]] if len(node.outputs) == 1 else None

    def evaluate(self, node: Node, values: Any) -> Any:
        """Replace slices of a copy; return None for reductions, which onnx's reference evaluator handles."""
        data, where, updates = values[:3]
        if node.attrs.get("reduction", "none") != "none" or where.shape[-1] == 0:
            return None
        result = np.array(data)
        result[tuple(np.moveaxis(where, -1, 0))] = updates
        return result


class TensorScatter(Rule):
    """Updates of a cache, written at one position per sample along one axis."""

    caches = ((0, 0),)

    def propagate(self, step: Step) -> None:
        """Unite all axes of cache and update but the written axis and that of the samples."""
        axis, operands = step.axis(-2), [step.labels(0), step.labels(1)]
        for k in range(2):
            for a in (0, axis):
                operands[k] = step.drop_axis(operands[k], a, Reason.FIXED_SIZE, "a cache is written along this axis")
        shape = tuple(1 if a in (0, axis) else n for a, n in enumerate(step.shape(0)))
        step.set(0, broadcast(step.atoms, [(labels, shape) for labels in operands], len(shape), step.reason))


class Compress(Rule):
    """Positions along an axis where a condition holds; without an axis, of the flattened data."""

    def propagate(self, step: Step) -> None:
        """Select positions for a known condition; freeze the axis for any other."""
        labels, shape = step.labels(0), step.shape(0)
        axis = step.attr("axis")
        if axis is None:
            step.freeze(labels, Reason.FIXED_SIZE, "Compress picks single elements")
            return
        at, condition = int(axis) % len(shape), step.table.facts.static_value(step.node.inputs[1])
        if condition is None:
            labels = step.drop_axis(labels, at, Reason.FIXED_SIZE, _BY_INDEX)
        else:
            labels = step.take(labels, at, np.flatnonzero(condition))
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """Drop the conditions of removed channels."""
        axis, condition = cut.attr("axis"), cut.before.value(1)
        keep = None if axis is None else cut.keep(cut.node.inputs[0], int(axis) % len(cut.before.shape(0)))
        if keep is not None and condition is not None:
            cut.set_input(1, condition[keep[: condition.size]])

    def infer(self, node: Node, shapes: list[AxisSizes | None], values: list[Any]) -> list[AxisSizes | None]:
        """Return the number of true conditions as the size of the axis."""
        x, condition, axis = shapes[0], values[1], node.attrs.get("axis")
        count = None if condition is None else int(np.count_nonzero(condition))
        if x is None or axis is None:
            return [(count,) if axis is None else None]
        return [tuple(count if a == axis % len(x) else n for a, n in enumerate(x))]


register("", "GatherElements", rule=GatherElements())
register("", "GatherND", rule=GatherND())
register("", "ScatterElements", "Scatter", rule=ScatterElements())
register("", "ScatterND", rule=ScatterND())
register("", "TensorScatter", rule=TensorScatter())
register("", "Compress", rule=with_facts(Compress(), sized_by_values=True))
