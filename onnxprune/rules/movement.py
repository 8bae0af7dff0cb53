"""Operators that move data without computing: they run themselves on the labels."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Node
from onnxprune.labels import movement
from onnxprune.labels.combine import Shape, broadcast, concatenate
from onnxprune.labels.label import NONE, Label, Labels, along
from onnxprune.operators.registry import Read
from onnxprune.rules.context import Cut, Step
from onnxprune.rules.registry import Inverse, Move, Rule, register


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


class Reshape(Rule):
    """Reshape, Flatten, Squeeze, Unsqueeze: the same data under other sizes."""

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

    def rewrite(self, cut: Cut) -> None:
        """Only Reshape itself carries a target."""
        if cut.node.op != "Reshape" or None in cut.out_shape():
            return
        target, source, new = cut.value(1), cut.shape(0), cut.out_shape()
        if target is None or resolve_target(target.tolist(), source, cut.attr("allowzero", 0)) != new:
            cut.set_target(1, new)


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


class Concat(Rule):
    """Parts one after the other."""

    moves = Move.JOIN

    def propagate(self, step: Step) -> None:
        """Concatenate the labels; a part without labels stays whole."""
        rank = len(step.out_shape())
        operands = [(step.labels(i), step.shape(i)) for i in range(len(step.node.inputs))]
        axis = step.axis(0, rank)
        step.set(0, concatenate(step.atoms, operands, axis, step.reason, step.node.outputs[0]))


register("", "Transpose", rule=Transpose())
register("", "Reshape", "Flatten", "Squeeze", "Unsqueeze", rule=Reshape())
register("", "Expand", rule=Expand())
register("", "Tile", rule=Tile())
register("", "Concat", rule=Concat())
