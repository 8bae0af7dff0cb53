"""Operators that move data: permute, reshape, split, slice, pad."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Node
from onnxprune.labels import algebra
from onnxprune.labels.algebra import Shape, broadcast, concatenate, split_points
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import NONE, Label, Labels, along, covering, drop
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.operands import (
    Values,
    axes_of,
    axis_of,
    broadcast_sizes,
    read_integers,
    require_integers,
    require_value,
    resolve_sizes,
    slice_of,
    where_known,
    whole_numbers,
)
from onnxprune.operators.registry import Array, Inverse, Move, Read, Rule, register
from onnxprune.operators.sizes import broadcast_pairs


class Transpose(Rule):
    """A permutation of the axes."""

    moves = Move.ORDER

    def inverse(self, node: Node, i: int, constant: Read) -> Inverse | None:
        """Return the inverse permutation, where the node has its own as an attribute."""
        perm = node.attrs.get("perm")
        if perm is None:
            return None
        back = np.argsort(perm)
        return Inverse(lambda value, _addends, _shape: value.transpose(back))

    def propagate(self, step: Step) -> None:
        """Permute the labels."""
        rank = len(step.shape(0))
        step.set(0, algebra.transpose(step.labels(0), step.attr("perm", list(range(rank))[::-1])))

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the sizes in the new order."""
        perm = node.attrs.get("perm")
        return [shapes[0][::-1] if perm is None else tuple(shapes[0][p] for p in perm)]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's transpose."""
        return np.transpose(require_value(values, 0), node.attrs.get("perm"))


class SameData(Rule):
    """The same data under another shape."""

    operands = targets = (1,)
    moves = Move.SHAPE

    def propagate(self, step: Step) -> None:
        """Reshape the labels run by run."""
        labels = step.labels(0)
        before, after = step.shape(0), step.out_shape()
        if labels and (None in before or None in after):
            step.freeze(labels, Reason.DYNAMIC_SHAPE, "the sizes around this reshape depend on the data")
            return
        step.set(0, algebra.reshape(step.atoms, labels, before, after, step.reason))


class Reshape(SameData):
    """Reshape to an operand; 0 and -1 are preserved."""

    infers_size = True

    def fits(self, node: Node, shapes: Sequence[Any], out: Sequence[int], read: Read) -> bool:
        """Return whether the number of elements stays."""
        return shapes[0] is None or None in shapes[0] or prod(shapes[0]) == prod(out)

    def target_entries(self, node: Node, old: Sequence[int], target: Sequence[int], source: Sequence[int]) -> list[int]:
        """Keep 0 and -1 where they stand for the new sizes."""
        entries = [o if o in (0, -1) else t for o, t in zip(old, target, strict=True)]
        resolved = resolve_target(entries, tuple(source), node.attrs.get("allowzero", 0))
        return entries if resolved == tuple(target) else list(target)

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the number of elements before and after."""
        target = node.attrs["shape"] if node.version < 5 else [int(n) for n in np.ravel(cast(Array, read(1)))]
        if not node.attrs.get("allowzero", 0):
            target = [shapes[0][i] if n == 0 else n for i, n in enumerate(target)]
        total, known_product = prod(shapes[0]), prod(n for n in target if n != -1)
        yield total, total - total % known_product if -1 in target else known_product

    def rewrite(self, cut: Cut) -> None:
        """Write the new sizes into the target."""
        if None in cut.out_shape():
            return
        target, source, new = cut.value(1), cut.shape(0), cut.out_shape()
        if target is None or resolve_target(target.tolist(), source, cut.attr("allowzero", 0)) != new:
            cut.set_target(1, new)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the resolved target, where it fits."""
        target = require_integers(read_integers(node, values, 1, "shape", 5))
        return [resolve_sizes(target, shapes[0], node.attrs.get("allowzero", 0))]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's reshape."""
        data, zero = require_value(values, 0), not node.attrs.get("allowzero", 0)
        target = whole_numbers(require_value(values, 1))
        return data.reshape([data.shape[i] if (d == 0 and zero) else d for i, d in enumerate(target)])


class Flatten(SameData):
    """A matrix: axes before ``axis`` and from it on."""

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return both products of sizes."""
        axis, rank = node.attrs.get("axis", 1), len(shapes[0])
        axis = axis + rank if axis < 0 else axis
        if not 0 <= axis <= rank:
            return None
        return [(prod(shapes[0][:axis]), prod(shapes[0][axis:]))]


class Squeeze(SameData):
    """Removal of axes of size 1."""

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the removed axes, which have a size of 1."""
        axes = node.attrs.get("axes") if node.version < 13 else read(1)
        for axis in () if axes is None else np.ravel(axes):
            yield shapes[0][int(axis)], 1

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the shape without the given axes, or without all axes of size 1."""
        axes, shape = read_integers(node, values, 1, "axes", 13), shapes[0]
        out = {i for i, n in enumerate(shape) if n == 1} if axes is None else {axis_of(a, len(shape)) for a in axes}
        return None if any(shape[a] != 1 for a in out) else [tuple(n for i, n in enumerate(shape) if i not in out)]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's squeeze."""
        return np.squeeze(require_value(values, 0), axis=axes_of(node, values))


class Unsqueeze(SameData):
    """Insertion of axes of size 1."""

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the shape with 1 at the given axes, which count in the result."""
        axes = require_integers(read_integers(node, values, 1, "axes", 13))
        rank = len(shapes[0]) + len(axes)
        new, sizes = {axis_of(a, rank) for a in axes}, iter(shapes[0])
        return None if len(new) != len(axes) else [tuple(1 if i in new else next(sizes) for i in range(rank))]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Reshape the value."""
        axes, data = axes_of(node, values) or (), require_value(values, 0)
        rank = data.ndim + len(axes)
        new, sizes = {a % rank for a in axes}, iter(data.shape)
        return data.reshape([1 if i in new else next(sizes) for i in range(rank)])


def resolve_target(target: list[int], source: tuple[int, ...], allowzero: int) -> tuple[int, ...] | None:
    """Resolve a Reshape target to a shape; None where it does not fit."""
    sizes = [source[i] if d == 0 and not allowzero and i < len(source) else d for i, d in enumerate(target)]
    total, known = prod(source), prod([d for d in sizes if d != -1])
    if -1 in sizes:
        if known == 0 or total % known:
            return None
        sizes[sizes.index(-1)] = total // known
    return tuple(sizes) if prod(sizes) == total else None


def births_of_copies(step: Step, before: Shape, after: Shape) -> Labels:
    """Create atoms of a static axis that holds copies of one position, whose number is free."""
    name, result = step.node.outputs[0], NONE
    for axis, (n, m) in enumerate(zip(before, after, strict=True)):
        if n == 1 and m is not None and m > 1 and axis and not step.table.facts.varies(name, axis):
            result = (*result, along(step.atoms.new(m, name, axis), axis, len(after)))
    return result


class Expand(Rule):
    """Broadcast to a target: labels pass; a repeated axis can have any size, so it gets atoms of its own."""

    operands = targets = (1,)
    moves = Move.REPEAT
    makes_labels = True

    def target_entries(self, node: Node, old: Sequence[int], target: Sequence[int], source: Sequence[int]) -> list[int]:
        """Keep 1, which leaves an axis as it is."""
        return [o if o == 1 else t for o, t in zip(old, target, strict=True)]

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of the data and those they are expanded to."""
        return broadcast_pairs(shapes[0], [int(n) for n in np.ravel(cast(Array, read(1)))])

    def propagate(self, step: Step) -> None:
        """Align labels to the output's rank; create atoms for every repeated axis of static size."""
        labels, shape, out = step.labels(0), step.shape(0), step.out_shape()
        result = broadcast(step.atoms, [(labels, shape)], len(out), step.reason)
        before = (1,) * (len(out) - len(shape)) + shape
        step.set(0, (*result, *births_of_copies(step, before, out)))

    def rewrite(self, cut: Cut) -> None:
        """Write the new sizes into the target."""
        target = cut.value(1)
        new = cut.out_shape()
        if None not in new and (target is None or _broadcast_to(cut.shape(0), target) != new):
            known = cut.before.shape(1)
            cut.set_target(1, new if not known or known[0] is None else new[len(new) - known[0] :])

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the broadcast shape of data and target."""
        return [broadcast_sizes((shapes[0], tuple(require_integers(read_integers(node, values, 1, "", 1)))))]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's broadcasting."""
        data, target = require_value(values, 0), whole_numbers(require_value(values, 1))
        return np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(target)))


def _broadcast_to(shape: tuple[int, ...], target: NDArray[np.int64]) -> tuple[int, ...] | None:
    try:
        return tuple(np.broadcast_shapes(shape, tuple(int(t) for t in target)))
    except ValueError:
        return None


class Tile(Rule):
    """Repetition; a repeated labelled axis repeats its atoms."""

    operands = targets = (1,)
    moves = Move.REPEAT
    makes_labels = True

    def propagate(self, step: Step) -> None:
        """Tile the labels along the axes they depend on."""
        labels, before, after = step.labels(0), step.shape(0), step.out_shape()
        if labels and (None in before or None in after):
            step.freeze(labels, Reason.DYNAMIC_SHAPE, "the number of repeats depends on the data")
            return
        result: Labels = ()
        for x in labels:
            times = [after[a] // before[a] if x.ids.shape[a] > 1 else 1 for a in range(len(before))]
            if x.is_grid and any(t > 1 for t in times):
                step.atoms.couple(x)
            result = (*result, Label(np.tile(x.ids, times), x.pack))
        if step.node.version >= 6:
            result = (*result, *births_of_copies(step, before, after))
        step.set(0, result)

    def rewrite(self, cut: Cut) -> None:
        """Update the repeats that produce channels; repeats computed from sizes keep their values."""
        before, after = cut.shape(0), cut.out_shape()
        if None in before or None in after or cut.node.version < 6:
            return
        times = [m // n if n else 1 for n, m in zip(before, after, strict=True)]
        value = cut.value(1)
        if value is None or value.ravel().tolist() != times:
            cut.set_target(1, times)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return sizes times repeats."""
        repeats = require_integers(read_integers(node, values, 1, "", 6))
        return [tuple(n * r for n, r in zip(shapes[0], repeats, strict=True))]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's tile."""
        return np.tile(require_value(values, 0), whole_numbers(require_value(values, 1)))


class Concat(Rule):
    """Concatenation of parts."""

    moves = Move.JOIN

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of all inputs on the other axes."""
        axis = node.attrs.get("axis", 1) % len(shapes[0])
        for shape in shapes[1:]:
            for a, (one, other) in enumerate(zip(shapes[0], shape, strict=True)):
                if a != axis:
                    yield one, other

    def propagate(self, step: Step) -> None:
        """Concatenate the labels; a part without labels is kept whole."""
        rank = len(step.out_shape())
        operands = [(step.labels(i), step.shape(i)) for i in range(len(step.node.inputs))]
        axis = step.axis(0, rank)
        step.set(0, concatenate(step.atoms, operands, axis, step.reason, step.node.outputs[0]))

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Add up the sizes along the axis; all others agree."""
        first = shapes[0]
        axis = axis_of(node.attrs["axis"] if node.version >= 4 else node.attrs.get("axis", 1), len(first))
        if any((*s[:axis], *s[axis + 1 :]) != (*first[:axis], *first[axis + 1 :]) for s in shapes):
            return None
        return [(*first[:axis], sum(s[axis] for s in shapes), *first[axis + 1 :])]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's concatenate."""
        return np.concatenate([require_value(values, i) for i in range(len(values))], axis=node.attrs["axis"])


register("", "Transpose", rule=Transpose())
register("", "Reshape", rule=Reshape())
register("", "Flatten", rule=Flatten())
register("", "Squeeze", rule=Squeeze())
register("", "Unsqueeze", rule=Unsqueeze())
register("", "Expand", rule=Expand())
register("", "Tile", rule=Tile())
register("", "Concat", rule=Concat())


Range = tuple[int, int, int]
"""(start, end, step) along one axis."""
# Either bound fits into 32 bits, which operands may have.
_LAST = (1 << 31) - 1
_FULL_RANGE: Range = (0, _LAST, 1)


class Split(Rule):
    """Consecutive parts along one axis."""

    operands = targets = (1,)
    moves = Move.SELECT

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the size of the axis and the sum of the parts."""
        axis_size = shapes[0][node.attrs.get("axis", 0)]
        sizes = node.attrs.get("split") if node.version < 13 else read(1)
        if sizes is not None:
            yield axis_size, int(np.sum(sizes))
        elif node.version < 18:
            yield axis_size, axis_size - axis_size % len(node.outputs)

    def propagate(self, step: Step) -> None:
        """Take each part's range."""
        axis, labels = step.axis(), step.labels(0)
        sizes = [step.table.facts.shape(o)[axis] for o in step.node.outputs if o]
        if len(sizes) != len(step.node.outputs) or None in sizes:
            step.freeze(labels, Reason.DYNAMIC_SHAPE, "the sizes of the parts are not known")
            return
        for o, (start, stop) in enumerate(split_points(sizes)):
            step.set(o, step.take(labels, axis, np.arange(start, stop)))

    def rewrite(self, cut: Cut) -> None:
        """Write the new sizes of the parts."""
        axis = cut.before.axis()
        if cut.keep(cut.node.inputs[0], axis) is None and not cut.touched():
            return
        sizes = [cut.out_shape(o)[axis] for o in range(len(cut.node.outputs))]
        if cut.before.has(1):
            value = cut.value(1)
            if value is None or value.tolist() != sizes:
                cut.set_target(1, sizes)
        elif "split" in cut.node.attrs:
            cut.set_attr("split", sizes)
        elif len(set(sizes)) > 1:
            if cut.node.version >= 13:
                cut.set_target(1, sizes)
                cut.set_attr("num_outputs", None)
            else:
                cut.set_attr("split", sizes)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return sizes as given, else equal parts, the last of which may be smaller."""
        axis, count = axis_of(node.attrs.get("axis", 0), len(shapes[0])), len(node.outputs)
        axis_size = shapes[0][axis]
        sizes = read_integers(node, values, 1, "split", 13)
        if sizes is None:
            if axis_size % count and node.version < 18:
                return None
            part = -(-axis_size // count)
            sizes = [part] * (count - 1) + [axis_size - part * (count - 1)]
        return None if sum(sizes) != axis_size else [(*shapes[0][:axis], n, *shapes[0][axis + 1 :]) for n in sizes]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's split."""
        data, axis = require_value(values, 0), node.attrs.get("axis", 0)
        sizes: Any = values[1] if len(values) > 1 and values[1] is not None else node.attrs.get("split")
        if sizes is None:
            count = len(node.outputs)
            chunk = -(-data.shape[axis] // count)
            sizes = [chunk] * (count - 1) + [data.shape[axis] - chunk * (count - 1)]
        return list(np.split(data, np.cumsum(sizes)[:-1], axis=axis))


Bounds = tuple[int, "int | None", "int | None", "int | None"]
"""(axis, start, end, step) of a sliced axis, None where it follows the size of an input."""


class Slice(Rule):
    """Ranges along axes, with constant bounds."""

    operands = (1, 2, 3, 4)
    moves = Move.SELECT

    def _bounds(self, step: Step) -> list[Bounds] | None:
        """Return bounds of every sliced axis; None where they, or the axes, are not known."""
        rank = len(step.shape(0))
        starts: Sequence[int | None] | None
        ends: Sequence[int | None] | None
        if step.node.version < 10:
            starts, ends = step.attr("starts"), step.attr("ends")
            axes, steps = step.attr("axes"), None
        else:
            starts, ends = step.entries(1), step.entries(2)
            axes, steps = step.entries(3), step.entries(4)
            if any(step.has(i) and operand is None for i, operand in ((3, axes), (4, steps))) or None in (axes or ()):
                return None
        if starts is None or ends is None:
            return None
        axes = range(len(starts)) if axes is None else axes
        return [
            (int(a) % rank, s, e, t) for a, s, e, t in zip(axes, starts, ends, steps or [1] * len(starts), strict=True)
        ]

    def propagate(self, step: Step) -> None:
        """Select the positions; freeze an axis sliced at unknown bounds."""
        labels, shape = step.labels(0), step.shape(0)
        bounds = self._bounds(step)
        if bounds is None:
            known = step.value(3) if step.has(3) else None
            axes = range(len(shape)) if known is None else [int(a) % len(shape) for a in known.ravel()]
            for axis in axes:
                labels = step.drop_axis(labels, axis, Reason.MISSING_CONSTANT, "this axis is sliced at computed bounds")
            step.set(0, labels)
            return
        for axis, start, end, stride in bounds:
            if start is None or end is None or stride is None:
                labels = step.drop_axis(
                    labels, axis, Reason.DYNAMIC_SHAPE, "this axis is sliced at bounds that follow the size of an input"
                )
            elif covering(labels, axis) is not None:
                index = np.arange(shape[axis])[slice_of(start, end, stride, shape[axis])]
                if index.size == shape[axis] and stride == 1:
                    continue
                labels = step.take(labels, axis, index)
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """Rewrite bounds and steps to select the surviving positions; use a Gather where no range does."""
        bounds = self._bounds(cut.before)
        if bounds is None:
            return
        before, source = cut.before.shape(0), cut.node.inputs[0]
        ranges: list[Range] = []
        gathers: list[tuple[int, NDArray[np.int64]]] = []
        for k, (axis, start, end, stride) in enumerate(bounds):
            if start is None or end is None or stride is None:
                ranges.append(self._open(cut, k, (start, end, stride)))
                continue
            old: Range = (start, end, stride)
            keep = cut.keep(source, axis)
            if keep is None:
                ranges.append(old)
                continue
            index = np.arange(before[axis])[slice_of(*old, before[axis])]
            positions = (np.cumsum(keep) - 1)[index[keep[index]]]
            range_found = _as_range(positions, int(keep.sum()), old, self._stated(cut, k) or old)
            if range_found is None:
                gathers.append((axis, positions))
            ranges.append(range_found or _FULL_RANGE)
        last = gathers.pop() if len(gathers) == len(ranges) > 0 else None
        for axis, positions in gathers:
            cut.pick(0, axis, positions)
        if last is not None:
            cut.replace("Gather", 2, axis=last[0])
            cut.set_input(1, last[1])
        elif cut.node.version >= 10:
            self._state(cut, ranges)
        elif ranges != [tuple(bound) for _, *bound in bounds]:
            cut.set_attr("starts", [r[0] for r in ranges])
            cut.set_attr("ends", [r[1] for r in ranges])

    def _open(self, cut: Cut, k: int, known: Sequence[int | None]) -> Range:
        """Return entry ``k`` of bounds that follow the size of an input, at the sizes of the first probe."""
        stated_bounds = self._stated(cut, k)
        if stated_bounds is None:
            cut.fail("its bounds are computed in a way that cannot follow the new sizes")
            raise AssertionError
        start, end, step = (current if n is None else n for n, current in zip(known, stated_bounds, strict=True))
        return start, end, step

    @staticmethod
    def _stated(cut: Cut, k: int) -> Range | None:
        """Return entry ``k`` of the bounds and steps in the pruned model; None where one is not known."""
        if cut.node.version < 10:
            return None
        values = [cut.value(i) for i in (1, 2)] + ([cut.value(4)] if cut.before.has(4) else [np.ones(k + 1, int)])
        start, end, step = (None if v is None or v.size <= k else int(v.ravel()[k]) for v in values)
        return None if start is None or end is None or step is None else (start, end, step)

    @staticmethod
    def _state(cut: Cut, ranges: list[Range]) -> None:
        operands = (1, 2, 4) if cut.before.has(4) else (1, 2)
        for i, bounds in zip(operands, (list(column) for column in zip(*ranges, strict=True)), strict=False):
            value = cut.value(i)
            if value is None or value.ravel().tolist() != bounds:
                cut.set_target(i, bounds)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the number of positions in each range."""
        starts, ends = (
            require_integers(read_integers(node, values, i, n, 10)) for i, n in ((1, "starts"), (2, "ends"))
        )
        axes = read_integers(node, values, 3, "axes", 10) or list(range(len(starts)))
        steps = (None if node.version < 10 else read_integers(node, values, 4, "steps", 10)) or [1] * len(starts)
        result = list(shapes[0])
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            a = axis_of(axis, len(result))
            result[a] = len(range(*slice_of(start, end, step, shapes[0][a]).indices(shapes[0][a])))
        return [tuple(result)]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's slices."""
        data = require_value(values, 0)
        if node.version < 10:
            starts, ends = node.attrs["starts"], node.attrs["ends"]
            axes, steps = node.attrs.get("axes", range(len(starts))), [1] * len(starts)
        else:
            starts, ends = whole_numbers(require_value(values, 1)), whole_numbers(require_value(values, 2))
            operands = [*values[3:], None, None]
            axes = range(len(starts)) if operands[0] is None else whole_numbers(operands[0])
            steps = [1] * len(starts) if operands[1] is None else whole_numbers(operands[1])
        index = [slice(None)] * data.ndim
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            index[axis] = slice_of(start, end, step, data.shape[axis])
        return data[tuple(index)]


def _as_range(positions: NDArray[np.int64], size: int, *known: Range) -> Range | None:
    """Return a range that selects these positions of an axis of ``size``, preferably a known one; None if none does."""
    strides = set(np.diff(positions).tolist()) or {known[0][2]}
    if not positions.size:
        return (0, 0, known[0][2])
    if len(strides) > 1:
        return None
    step, first, last = strides.pop(), int(positions[0]), int(positions[-1])
    stop = last + (1 if step > 0 else -1)
    candidates = [*known[::-1], (first, known[0][1], step), (first, stop if stop >= 0 else -_LAST, step)]
    return next((t for t in candidates if t[2] and _picks(t, size, positions)), None)


def _picks(bound: Range, size: int, positions: NDArray[np.int64]) -> bool:
    return np.array_equal(np.arange(size)[slice_of(*bound, size)], positions)


def _at(cut: Cut, i: int, place: int) -> int:
    """Return one entry of an operand at the first sizes of the inputs."""
    value = cut.value(i)
    if value is None:
        cut.fail(f"operand {i} is computed in a way that cannot follow the new sizes")
    assert value is not None
    return int(value.ravel()[place])


class Pad(Rule):
    """Constant padding of a labelled axis adds channels that may be removed like any other."""

    chooses = True

    operands = (1, 3)
    by_operand = False
    """Whether the padding is an operand at every version."""

    def fits(self, node: Node, shapes: Sequence[Any], out: Sequence[int], read: Read) -> bool:
        """Return whether no axis is reflected by its size or more."""
        if node.attrs.get("mode", "constant") != "reflect" or shapes[0] is None or len(node.inputs) > 3:
            return True
        value = read(1)
        pads = node.attrs.get("pads", []) if value is None else value.ravel().tolist()
        sizes = (*shapes[0], *shapes[0])
        return len(pads) != len(sizes) or all(n is None or p < n for p, n in zip(pads, sizes, strict=True))

    def pads(self, step: Step) -> list[tuple[int | None, int | None]] | None:
        """Return (before, after) of every axis, None where it follows the size of an input; None if unknown."""
        rank = len(step.shape(0))
        flat: Sequence[int | None] | None
        axes = list(range(rank))
        if step.node.version < 11 and not self.by_operand:
            flat = step.attr("pads", step.attr("paddings"))
        else:
            flat = step.entries(1)
            axes_value = step.value(3)
            if step.has(3) and axes_value is None:
                return None
            if axes_value is not None:
                axes = [int(a) % rank for a in axes_value.ravel()]
        if flat is None:
            return None
        result: list[tuple[int | None, int | None]] = [(0, 0)] * rank
        for i, axis in enumerate(axes):
            result[axis] = (flat[i], flat[i + len(axes)])
        return result

    def propagate(self, step: Step) -> None:
        """Create atoms for constant fill; freeze a labelled axis with any other padding."""
        labels = step.labels(0)
        pads = self.pads(step)
        if pads is None:
            step.freeze(labels, Reason.MISSING_CONSTANT, "the padding is not known")
            return
        for axis, (low, high) in enumerate(pads):
            label = covering(labels, axis)
            if label is None or (low, high) == (0, 0):
                continue
            if low is None or high is None:
                labels = step.drop_axis(labels, axis, Reason.DYNAMIC_SHAPE, "its padding follows the size of an input")
                continue
            if label.is_grid or step.attr("mode", "constant") != "constant" or low < 0 or high < 0:
                labels = step.drop_axis(labels, axis, Reason.FIXED_SIZE, "this axis is padded")
                continue
            padding_ids = step.atoms.new(low + high, step.node.outputs[0], axis)
            ids = np.concatenate([padding_ids[:low], label.ids.ravel(), padding_ids[low:]])
            shape = [1] * label.ids.ndim
            shape[axis] = ids.size
            labels = (*drop(labels, label), Label(ids.reshape(shape), axis))
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """Reduce the padding by the removed filled channels."""
        pads = self.pads(cut.before)
        if pads is None:
            return
        new: list[tuple[int | None, int | None]] = []
        for axis, (low, high) in enumerate(pads):
            size = cut.before.out_shape()[axis]
            keep = cut.keep(cut.node.outputs[0], axis) if low or high else None
            if keep is None or low is None or high is None:
                new.append((low, high))
            else:
                new.append((int(keep[:low].sum()), int(keep[size - high :].sum())))
        if cut.node.version < 11 and not self.by_operand:
            if new != pads:
                cut.set_attr("pads", [p[0] for p in new] + [p[1] for p in new])
        else:
            axes = cut.before.value(3)
            order = range(len(new)) if axes is None else [int(a) % len(new) for a in axes.ravel()]
            new_pads = [new[a][0] for a in order] + [new[a][1] for a in order]
            value = cut.value(1)
            target = [_at(cut, 1, place) if n is None else n for place, n in enumerate(new_pads)]
            if value is None or value.ravel().tolist() != target:
                cut.set_target(1, target)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return sizes plus padding."""
        pads = require_integers(read_integers(node, values, 1, "pads", 11))
        rank = len(shapes[0])
        axes = (read_integers(node, values, 3, "", 1) if node.version >= 18 else None) or list(range(rank))
        result = list(shapes[0])
        for k, axis in enumerate(axes):
            result[axis_of(axis, rank)] += pads[k] + pads[k + len(axes)]
        return [tuple(result)] if len(pads) == 2 * len(axes) else None


register("", "Split", rule=Split())
register("", "Slice", rule=Slice())
register("", "Pad", rule=Pad())
