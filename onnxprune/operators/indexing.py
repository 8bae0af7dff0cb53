"""Gather, shape operators, and what makes tensors out of sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.labels import movement
from onnxprune.labels.label import Labels, along, covering
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.operands import Values, axis_of, given, listed, needed, where_known, whole_numbers
from onnxprune.operators.registry import Move, Rule, register


class Gather(Rule):
    """Positions picked by an index tensor, which may be known."""

    moves = Move.SOME

    def propagate(self, step: Step) -> None:
        """A known scalar or list takes positions; an unknown index fixes its axis."""
        labels, axis = step.labels(0), step.axis()
        rank = len(step.shape(1))
        index = step.table.facts.static_value(step.node.inputs[1])
        if covering(labels, axis) is not None and (index is None or rank > 1):
            labels = step.drop_axis(labels, axis, "fixed-size", "positions of this axis are looked up by index")
        elif index is not None and covering(labels, axis) is not None:
            labels = step.take(labels, axis, np.atleast_1d(index).astype(np.int64) % step.shape(0)[axis])
        step.set(0, self._place(labels, axis, rank))

    @staticmethod
    def _place(labels: Labels, axis: int, rank: int) -> Labels:
        """The axis is replaced by the index's own axes."""
        if rank == 0:
            return movement.remove_axis(labels, axis)
        for _ in range(rank - 1):
            labels = movement.insert_axis(labels, axis + 1)
        return labels

    def rewrite(self, cut: Cut) -> None:
        """Indices move with the positions before them; those of removed channels go."""
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
        """The index's axes in place of the gathered one."""
        axis = axis_of(node.attrs.get("axis", 0), len(shapes[0]))
        return [(*shapes[0][:axis], *shapes[1], *shapes[0][axis + 1 :])]

    def evaluate(self, node: Node, values: Values) -> Any:
        """numpy's take."""
        return given(values, 0).take(given(values, 1).astype(np.int64, copy=False), axis=node.attrs.get("axis", 0))


class Shape(Rule):
    """Sizes are plain numbers: the engine watches what they are used for."""

    def propagate(self, step: Step) -> None:
        """Nothing to say about labels."""
        step.labels(0)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """One number for every axis asked for, one alone for the number of elements."""
        part = shapes[0][node.attrs.get("start", 0) : node.attrs.get("end", len(shapes[0]))]
        return [() if node.op == "Size" else (len(part),)]


class Fill(Rule):
    """A tensor of one repeated value can take any size: its axes are born with atoms, like a constant's."""

    operands = targets = (0,)
    makes_labels = True

    def propagate(self, step: Step) -> None:
        """One birth per static axis."""
        shape, name = step.out_shape(), step.node.outputs[0]
        result: Labels = ()
        if np.asarray(step.attr("value", np.zeros(1, np.float32))).dtype.kind in "iub":
            return  # sizes and masks
        for axis, n in enumerate(shape):
            if n is not None and n > 1 and not step.table.facts.varies(name, axis):
                result = (*result, along(step.atoms.new(n, name, axis), axis, len(shape)))
        step.set(0, result)

    def rewrite(self, cut: Cut) -> None:
        """The shape operand names the new sizes."""
        target, new = cut.value(0), cut.out_shape()
        if None not in new and (target is None or tuple(target.tolist()) != new):
            cut.set_target(0, new)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """As the operand says."""
        return [tuple(needed(listed(node, values, 0, "", 1)))]

    def evaluate(self, node: Node, values: Values) -> Any:
        """One value everywhere."""
        fill = node.attrs.get("value", np.zeros(1, np.float32))
        return np.full(whole_numbers(given(values, 0)), np.ravel(fill)[0], dtype=fill.dtype)


class Unlabelled(Rule):
    """Produces indices or numbers from tensors that have no channels."""

    def propagate(self, step: Step) -> None:
        """Every input with channels keeps them."""
        for i in range(len(step.node.inputs)):
            step.freeze(step.labels(i), "fixed-size", f"{step.node.op} depends on the size of its input")


class Range(Unlabelled):
    """Numbers from a start to an end."""

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """As many as steps fit."""
        start, end, step = (float(given(values, i).item()) for i in range(3))
        return [(max(math.ceil((end - start) / step), 0),)]

    def evaluate(self, node: Node, values: Values) -> Any:
        """numpy's arange, in the start's type."""
        start, end, step = (given(values, i) for i in range(3))
        return np.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


class Trilu(Rule):
    """Upper or lower triangle of the last two axes."""

    def propagate(self, step: Step) -> None:
        """Batch axes pass."""
        labels, rank = step.labels(0), len(step.shape(0))
        for axis in (rank - 2, rank - 1):
            labels = step.drop_axis(labels, axis, "fixed-size", "a triangle of this axis is taken")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Any], values: Any) -> list[Any] | None:
        """The data's shape."""
        return [shapes[0]]


register("", "Gather", rule=Gather())
register("", "Shape", "Size", rule=Shape())
register("", "ConstantOfShape", rule=Fill())
register("", "Range", rule=Range())
register("", "NonZero", "NonMaxSuppression", "OneHot", "EyeLike", "Unique", rule=Unlabelled())
register("", "Trilu", rule=Trilu())
