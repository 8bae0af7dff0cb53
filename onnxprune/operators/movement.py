"""Operators that move data without computing: they run themselves on the labels."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Node
from onnxprune.labels import movement
from onnxprune.labels.combine import Shape, broadcast, concatenate
from onnxprune.labels.label import NONE, Label, Labels, along
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.operands import (
    Values,
    axes_of,
    axis_of,
    given,
    joined,
    listed,
    needed,
    resolved,
    where_known,
    whole_numbers,
)
from onnxprune.operators.registry import Inverse, Move, Read, Rule, register


class Transpose(Rule):
    """A permutation of the axes."""

    moves = Move.ORDER

    def inverse(self, node: Node, i: int, constant: Read) -> Inverse | None:
        """The inverse permutation, where the node states its own."""
        perm = node.attrs.get("perm")
        if perm is None:
            return None
        back = np.argsort(perm)
        return Inverse(lambda value, _addends, _shape: value.transpose(back))

    def propagate(self, step: Step) -> None:
        """Permute the labels."""
        rank = len(step.shape(0))
        step.set(0, movement.transpose(step.labels(0), step.attr("perm", list(range(rank))[::-1])))

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Sizes in the new order."""
        perm = node.attrs.get("perm")
        return [shapes[0][::-1] if perm is None else tuple(shapes[0][p] for p in perm)]

    def evaluate(self, node: Node, values: Values) -> Any:
        """numpy's transpose."""
        return np.transpose(given(values, 0), node.attrs.get("perm"))


class SameData(Rule):
    """The same data under other sizes."""

    operands = targets = (1,)
    moves = Move.SHAPE

    def propagate(self, step: Step) -> None:
        """Reshape the labels run by run."""
        labels = step.labels(0)
        before, after = step.shape(0), step.out_shape()
        if labels and (None in before or None in after):
            step.freeze(labels, "dynamic-shape", "the sizes around this reshape depend on the data")
            return
        step.set(0, movement.reshape(step.atoms, labels, before, after, step.reason))


class Reshape(SameData):
    """Sizes as an operand says, which keeps 0 and -1 where they were meant."""

    def rewrite(self, cut: Cut) -> None:
        """The target names the new sizes."""
        if None in cut.out_shape():
            return
        target, source, new = cut.value(1), cut.shape(0), cut.out_shape()
        if target is None or resolve_target(target.tolist(), source, cut.attr("allowzero", 0)) != new:
            cut.set_target(1, new)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """The target, where it fits."""
        target = needed(listed(node, values, 1, "shape", 5))
        return [resolved(target, shapes[0], node.attrs.get("allowzero", 0))]

    def evaluate(self, node: Node, values: Values) -> Any:
        """numpy's reshape."""
        data, zero = given(values, 0), not node.attrs.get("allowzero", 0)
        target = whole_numbers(given(values, 1))
        return data.reshape([data.shape[i] if (d == 0 and zero) else d for i, d in enumerate(target)])


class Flatten(SameData):
    """A matrix: axes before ``axis`` and from it on."""

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Both products."""
        axis, rank = node.attrs.get("axis", 1), len(shapes[0])
        axis = axis + rank if axis < 0 else axis
        if not 0 <= axis <= rank:
            return None
        return [(prod(shapes[0][:axis]), prod(shapes[0][axis:]))]


class Squeeze(SameData):
    """Axes of size 1 are left out."""

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Without the axes named, or without all of size 1."""
        axes, shape = listed(node, values, 1, "axes", 13), shapes[0]
        out = {i for i, n in enumerate(shape) if n == 1} if axes is None else {axis_of(a, len(shape)) for a in axes}
        return None if any(shape[a] != 1 for a in out) else [tuple(n for i, n in enumerate(shape) if i not in out)]

    def evaluate(self, node: Node, values: Values) -> Any:
        """numpy's squeeze."""
        return np.squeeze(given(values, 0), axis=axes_of(node, values))


class Unsqueeze(SameData):
    """Axes of size 1 are put in."""

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """With 1 at the axes named, which count in the result."""
        axes = needed(listed(node, values, 1, "axes", 13))
        rank = len(shapes[0]) + len(axes)
        new, sizes = {axis_of(a, rank) for a in axes}, iter(shapes[0])
        return None if len(new) != len(axes) else [tuple(1 if i in new else next(sizes) for i in range(rank))]

    def evaluate(self, node: Node, values: Values) -> Any:
        """A reshape."""
        axes, data = axes_of(node, values) or (), given(values, 0)
        rank = data.ndim + len(axes)
        new, sizes = {a % rank for a in axes}, iter(data.shape)
        return data.reshape([1 if i in new else next(sizes) for i in range(rank)])


def resolve_target(target: list[int], source: tuple[int, ...], allowzero: int) -> tuple[int, ...] | None:
    """The shape a Reshape target comes out as, or None where it does not fit."""
    sizes = [source[i] if d == 0 and not allowzero and i < len(source) else d for i, d in enumerate(target)]
    total, known = prod(source), prod([d for d in sizes if d != -1])
    if -1 in sizes:
        if known == 0 or total % known:
            return None
        sizes[sizes.index(-1)] = total // known
    return tuple(sizes) if prod(sizes) == total else None


def births_of_copies(step: Step, before: Shape, after: Shape) -> Labels:
    """Atoms of an axis of static size that holds copies of one position: there may as well be fewer."""
    name, result = step.node.outputs[0], NONE
    for axis, (n, m) in enumerate(zip(before, after, strict=True)):
        if n == 1 and m is not None and m > 1 and axis and not step.table.facts.varies(name, axis):
            result = (*result, along(step.atoms.new(m, name, axis), axis, len(after)))
    return result


class Expand(Rule):
    """Broadcast to a target: labels pass; a repeated axis may take any size, so it is born with atoms of its own."""

    operands = targets = (1,)
    moves = Move.REPEAT
    makes_labels = True

    def propagate(self, step: Step) -> None:
        """Shift to the output's rank; one birth per repeated axis of static size."""
        labels, shape, out = step.labels(0), step.shape(0), step.out_shape()
        result = broadcast(step.atoms, [(labels, shape)], len(out), step.reason)
        before = (1,) * (len(out) - len(shape)) + shape
        step.set(0, (*result, *births_of_copies(step, before, out)))

    def rewrite(self, cut: Cut) -> None:
        """The target names the new sizes."""
        target = cut.value(1)
        new = cut.out_shape()
        if None not in new and (target is None or _broadcast_to(cut.shape(0), target) != new):
            known = cut.before.shape(1)
            cut.set_target(1, new if not known or known[0] is None else new[len(new) - known[0] :])

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Data and target broadcast."""
        return [joined((shapes[0], tuple(needed(listed(node, values, 1, "", 1)))))]

    def evaluate(self, node: Node, values: Values) -> Any:
        """numpy's broadcasting."""
        data, target = given(values, 0), whole_numbers(given(values, 1))
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
            step.freeze(labels, "dynamic-shape", "the number of repeats depends on the data")
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
        """Repeats computed from sizes stay what they were, but for those that make channels."""
        before, after = cut.shape(0), cut.out_shape()
        if None in before or None in after or cut.node.version < 6:
            return
        times = [m // n if n else 1 for n, m in zip(before, after, strict=True)]
        value = cut.value(1)
        if value is None or value.ravel().tolist() != times:
            cut.set_target(1, times)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Sizes times repeats."""
        repeats = needed(listed(node, values, 1, "", 6))
        return [tuple(n * r for n, r in zip(shapes[0], repeats, strict=True))]

    def evaluate(self, node: Node, values: Values) -> Any:
        """numpy's tile."""
        return np.tile(given(values, 0), whole_numbers(given(values, 1)))


class Concat(Rule):
    """Parts one after the other."""

    moves = Move.JOIN

    def propagate(self, step: Step) -> None:
        """Concatenate the labels; a part without labels stays whole."""
        rank = len(step.out_shape())
        operands = [(step.labels(i), step.shape(i)) for i in range(len(step.node.inputs))]
        axis = step.axis(0, rank)
        step.set(0, concatenate(step.atoms, operands, axis, step.reason, step.node.outputs[0]))

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Sizes add up along the axis, all others agree."""
        first = shapes[0]
        axis = axis_of(node.attrs["axis"] if node.version >= 4 else node.attrs.get("axis", 1), len(first))
        if any((*s[:axis], *s[axis + 1 :]) != (*first[:axis], *first[axis + 1 :]) for s in shapes):
            return None
        return [(*first[:axis], sum(s[axis] for s in shapes), *first[axis + 1 :])]

    def evaluate(self, node: Node, values: Values) -> Any:
        """numpy's concatenate."""
        return np.concatenate([given(values, i) for i in range(len(values))], axis=node.attrs["axis"])


register("", "Transpose", rule=Transpose())
register("", "Reshape", rule=Reshape())
register("", "Flatten", rule=Flatten())
register("", "Squeeze", rule=Squeeze())
register("", "Unsqueeze", rule=Unsqueeze())
register("", "Expand", rule=Expand())
register("", "Tile", rule=Tile())
register("", "Concat", rule=Concat())
