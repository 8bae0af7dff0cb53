"""Sequences of tensors: every tensor in one keeps its own labels.

They are tracked where their length and the positions in them are known. Any other operator that reads a sequence, such
as a loop that carries it, receives the labels of all of its tensors and freezes them.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.labels.algebra import Shape, broadcast, concatenate, insert_axis, remove_axis, split_points
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import Labels, covering
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.registry import Elements, Rule, register

_UNKNOWN = "the elements of this sequence are not known"


class Sequence(Rule):
    """Operators on sequences; the base class is the rule of those that only read the length."""

    shapeless = True

    def propagate(self, step: Step) -> None:
        """Leave the output unlabelled: a length does not depend on channels."""
        for i in range(len(step.node.inputs)):
            step.labels(i)

    @staticmethod
    def elements(step: Step) -> list[tuple[Labels, Shape | None]] | None:
        """Return labels and shapes of the tensors of input 0; where they are not known, freeze them and return None."""
        labels, known = step.labels(0), step.table.sequence(step.node.inputs[0])
        if known is None:
            step.freeze(labels, Reason.DYNAMIC_SHAPE, _UNKNOWN)
        return known

    @staticmethod
    def position(value: Any, length: int, default: int) -> int | None:
        """Return a position in a sequence counted from the front; None where it is not known."""
        if value is None:
            return None
        at = default if isinstance(value, str) else int(np.ravel(value)[0])
        return at + length if at < 0 else at

    def infer(self, node: Node, shapes: list[Any], values: list[Any]) -> list[Any]:
        """Return a scalar shape, that of a length."""
        return [()]


def _optional_value(node: Node, values: List[Any], i: int) -> Any:
    """Return the value of an optional operand, "" where it is absent."""
    return values[i] if i < len(node.inputs) and node.inputs[i] else ""


class Construct(Sequence):
    """Sequence of the input tensors."""

    def evaluate(self, node: Node, values: List[Any]) -> Any:
        """Leave the value unknown.

        Raises:
            NotImplementedError: a sequence is no array.
        """
        raise NotImplementedError

    def propagate(self, step: Step) -> None:
        """Collect the labels of all inputs."""
        step.table.set_sequence(step.node.outputs[0], [step.labels(i) for i in range(len(step.node.inputs))])

    def infer(self, node: Node, shapes: list[Any], values: list[Any]) -> list[Any]:
        """Return the shapes of all inputs."""
        return [Elements(shapes)]


class SplitToSequence(Sequence):
    """Consecutive parts along one axis, as a sequence."""

    operands = targets = (1,)

    @staticmethod
    def sizes(node: Node, shape: Shape | None, split: Any) -> list[int] | None:
        """Return sizes of the parts; ``split`` is "" where every position is a part."""
        axis = int(node.attrs.get("axis", 0))
        size = None if shape is None else shape[axis]
        if size is None or split is None:
            return None
        if isinstance(split, str):
            return [1] * size
        if np.ndim(split):
            return [int(n) for n in split]
        step = int(split)
        return [min(step, size - start) for start in range(0, size, step)]

    def propagate(self, step: Step) -> None:
        """Take each part's range; parts of an even division are kept equal, or their sizes are written one by one."""
        node, labels = step.node, step.labels(0)
        shape = step.table.facts.shape(node.inputs[0])
        split = step.value(1) if step.has(1) else ""
        sizes = self.sizes(node, shape, split)
        if sizes is None:
            step.freeze(labels, Reason.DYNAMIC_SHAPE, "the sizes of the parts are not known")
            return
        axis = step.axis(0, len(shape or ()))
        label = covering(labels, axis)
        if label is not None and axis != label.pack:
            step.fix(labels, axis, Reason.FIXED_SIZE, "rows of a grid become tensors of their own")
        parts = [step.take(labels, axis, np.arange(a, b)) for a, b in split_points(sizes)]
        if not self._keeps(node):
            parts = [remove_axis(part, axis) for part in parts]
        step.table.set_sequence(node.outputs[0], parts)

    @staticmethod
    def _keeps(node: Node) -> bool:
        return bool(node.attrs.get("keepdims", 1)) or (len(node.inputs) > 1 and bool(node.inputs[1]))

    def rewrite(self, cut: Cut) -> None:
        """Write the sizes of the surviving parts one by one."""
        source, shape = cut.node.inputs[0], cut.before.shape(0)
        split = cut.before.value(1) if cut.before.has(1) else ""
        sizes, axis = self.sizes(cut.node, shape, split), cut.before.axis()
        if sizes is None or cut.keep(source, axis) is None:
            return
        new = [cut.kept_between(source, axis, a, b) for a, b in split_points(sizes)]
        if isinstance(split, str):
            cut.fail("single channels become tensors of their own")
        else:
            cut.set_input(1, np.asarray(new, np.int64))

    def infer(self, node: Node, shapes: list[Any], values: list[Any]) -> list[Any]:
        """Return the data's shape with the size of each part."""
        x = shapes[0]
        sizes = self.sizes(node, x, _optional_value(node, values, 1))
        if sizes is None:
            return [None]
        axis = int(node.attrs.get("axis", 0)) % len(x)
        inner = [(n,) for n in sizes] if self._keeps(node) else [()] * len(sizes)
        return [Elements((*x[:axis], *n, *x[axis + 1 :]) for n in inner)]


class At(Sequence):
    """One tensor of a sequence."""

    def propagate(self, step: Step) -> None:
        """Pass the labels at a known position; otherwise unite all tensors, which must have equal shapes."""
        known = self.elements(step)
        if known is None:
            return
        at = self.position(step.value(1), len(known), 0)
        if at is not None:
            step.set(0, known[at][0])
        elif len({shape for _, shape in known}) == 1 and known[0][1] is not None:
            operands = [(labels, shape) for labels, shape in known if shape is not None]
            step.set(0, broadcast(step.atoms, operands, len(operands[0][1]), step.reason))
        else:
            step.freeze(step.labels(0), Reason.DYNAMIC_SHAPE, "a tensor at an unknown position of a sequence")

    def infer(self, node: Node, shapes: list[Any], values: list[Any]) -> list[Any]:
        """Return the shape of that tensor."""
        known = shapes[0]
        if not isinstance(known, Elements) or not known:
            return [None]
        at = self.position(values[1], len(known), 0)
        return [known[0] if len(set(known)) == 1 else None if at is None else known[at]]


class Change(Sequence):
    """SequenceInsert and SequenceErase: one tensor more, or less."""

    def _changed(self, node: Node, known: List[Any], value: Any, new: Any) -> list[Any] | None:
        inserts = node.op == "SequenceInsert"
        at = self.position(value, len(known), len(known) if inserts else -1)
        if at is None:
            return None
        return [*known[:at], new, *known[at:]] if inserts else [*known[:at], *known[at + 1 :]]

    def propagate(self, step: Step) -> None:
        """Insert or remove the labels of one tensor."""
        known, inserts = self.elements(step), step.node.op == "SequenceInsert"
        new, i = (step.labels(1), 2) if inserts else ((), 1)
        value = step.value(i) if step.has(i) else ""
        after = None if known is None else self._changed(step.node, [labels for labels, _ in known], value, new)
        if after is None:
            for labels in (step.labels(0), new):
                step.freeze(labels, Reason.DYNAMIC_SHAPE, _UNKNOWN)
        else:
            step.table.set_sequence(step.node.outputs[0], after)

    def infer(self, node: Node, shapes: list[Any], values: list[Any]) -> list[Any]:
        """Insert or remove the shape of one tensor."""
        inserts = node.op == "SequenceInsert"
        if not isinstance(shapes[0], Elements):
            return [None]
        value = _optional_value(node, values, 2 if inserts else 1)
        after = self._changed(node, shapes[0], value, shapes[1] if inserts else None)
        return [None if after is None else Elements(after)]


class Concat(Sequence):
    """ConcatFromSequence: concatenation along an axis, or stacking along a new axis."""

    def propagate(self, step: Step) -> None:
        """Propagate as Concat; along a new axis, unite the tensors position by position."""
        known = self.elements(step)
        shapes = [] if known is None else [shape for _, shape in known if shape is not None and None not in shape]
        if known is None or not known or len(shapes) != len(known):
            step.freeze(step.labels(0), Reason.DYNAMIC_SHAPE, _UNKNOWN)
            return
        operands = [(labels, shape) for (labels, _), shape in zip(known, shapes, strict=True)]
        rank = len(shapes[0])
        if not step.attr("new_axis", 0):
            step.set(0, concatenate(step.atoms, operands, step.axis(0, rank), step.reason, step.node.outputs[0]))
            return
        labels = broadcast(step.atoms, operands, rank, step.reason)
        step.set(0, insert_axis(labels, step.axis(0, rank + 1)))

    def infer(self, node: Node, shapes: list[Any], values: list[Any]) -> list[Any]:
        """Return the sum of the sizes along the axis, or a new axis of the sequence's length."""
        known = shapes[0]
        if not isinstance(known, Elements) or not known or None in known:
            return [None]
        first, axis = known[0] or (), int(node.attrs["axis"])
        if node.attrs.get("new_axis", 0):
            axis %= len(first) + 1
            return [(*first[:axis], len(known), *first[axis:])]
        axis %= len(first)
        sizes = [None if shape is None else shape[axis] for shape in known]
        total = None if None in sizes else sum(n or 0 for n in sizes)
        return [(*first[:axis], total, *first[axis + 1 :])]


register("", "SequenceConstruct", "SequenceEmpty", rule=Construct())
register("", "SplitToSequence", rule=SplitToSequence())
register("", "SequenceAt", rule=At())
register("", "SequenceInsert", "SequenceErase", rule=Change())
register("", "ConcatFromSequence", rule=Concat())
register("", "SequenceLength", rule=Sequence())
