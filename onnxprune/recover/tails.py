"""From a contraction's output on to where it is best judged: through operators that can be undone.

A layer is not aimed at its own output but at the sum it goes into, so that a branch repairs what other branches lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from onnxprune.graph.view import Graph, Node
from onnxprune.graph.weights_of import weight_of
from onnxprune.operators.registry import Move, Read, rule_of

Array = NDArray[Any]
Undo = Callable[[Array, Sequence[Array], Sequence[int]], Array]
"""(value behind the operator, other addends, shape in front of it) -> value in front of it."""


@dataclass(slots=True)
class InvertiblePath:
    """Operators between a contraction's output and its aim.

    Attributes:
        aim: the tensor that is aimed at. undo: what takes its value back to the contraction's output, last first.
        addends: activations that are added on the way, in the cut model. through: the operators.
        flats: edges of the flat parts of the activation that reads the aim, (level, whether it is flat below).
        moved: whether one of them moves values about. pooled: whether a mean over positions is all that reads the aim,
            or the activation behind it.
    """

    aim: str
    undo: list[tuple[Undo, int]] = field(default_factory=list)
    addends: list[str] = field(default_factory=list)
    through: list[Node] = field(default_factory=list)
    flats: list[tuple[float, bool]] = field(default_factory=list)
    moved: bool = False
    moves: list[Undo] = field(default_factory=list)
    pooled: bool = False

    def back(self, value: Array, addends: Sequence[Array], shape: Sequence[int]) -> Array:
        """The value that the contraction's output has to have for the aim to have ``value``."""
        for undo, number in reversed(self.undo):
            value = undo(value, addends[number : number + 1], shape)
        return value

    def moved_back(self, value: Array, shape: Sequence[int]) -> Array:
        """A value that lies as the aim does, laid out as the contraction's output; nothing is computed."""
        for move in reversed(self.moves):
            value = move(value, (), shape)
        return value


def tail_of(graph: Graph, start: str, ready: Callable[[str], bool], shape: Callable[[str], Any]) -> InvertiblePath:
    """As far as the value of ``start`` is only passed on, read by one operator at a time, and can be had back.

    Args:
        ready: whether an activation can be known before the contraction that gives ``start`` is repaired.
        shape: shapes of tensors.
    """
    tail = InvertiblePath(start)
    while _extend(graph, tail, ready, shape):
        pass
    tail.flats = _flats(graph, tail.aim)
    tail.pooled = not tail.moved and _is_pooled(graph, tail.aim, shape)
    return tail


def _is_pooled(graph: Graph, aim: str, shape: Callable[[str], Any]) -> bool:
    """Whether all that reads the aim is a mean over positions, maybe behind an activation that is flat or passes on."""
    for _ in range(2):
        readers = graph.consumers.get(aim, ())
        if len(readers) != 1 or aim in graph.outputs or aim in graph.captured:
            return False
        node = readers[0][0]
        if not rule_of(node).clamps:
            return _is_mean(node, shape)
        aim = node.outputs[0]
    return False


def _extend(graph: Graph, tail: InvertiblePath, ready: Callable[[str], bool], shape: Callable[[str], Any]) -> bool:
    """Go one operator further; whether that was possible."""
    readers = graph.consumers.get(tail.aim, ())
    if len(readers) != 1 or tail.aim in graph.outputs or tail.aim in graph.captured:
        return False
    node, position = readers[0]
    rule = rule_of(node)
    inverse = rule.inverse(node, position, constants(graph, node)) if node.outputs[0] else None
    if inverse is None:
        return False
    # An operand must not widen the value: there would be no one value in front of it.
    if rule.moves is None and shape(tail.aim) != shape(node.outputs[0]):
        return False
    # A reshape is undone with the shape of the contraction's output: nothing may have moved before it.
    if rule.moves is Move.SHAPE and tail.moved:
        return False
    addend = "" if inverse.addend is None else node.inputs[inverse.addend]
    if addend and not ready(addend):
        return False
    tail.undo.append((inverse.undo, len(tail.addends)))
    tail.addends += [addend] if addend else []
    if rule.moves not in (None, Move.SAME):
        tail.moved = True
        tail.moves.append(inverse.undo)
    tail.through.append(node)
    tail.aim = node.outputs[0]
    return True


def _is_mean(node: Node, shape: Callable[[str], Any]) -> bool:
    """Whether the node takes the mean over all positions."""
    if not rule_of(node).averages:
        return False
    before, after = shape(node.inputs[0]), shape(node.outputs[0])
    if before is None or after is None or len(before) < 3 or tuple(after[:2]) != tuple(before[:2]):
        return False
    return all(n == 1 for n in after[2:]) and not any(node.attrs.get("pads") or ())


def _flats(graph: Graph, aim: str) -> list[tuple[float, bool]]:
    """Edges of the flat parts of the activation that alone reads the aim."""
    readers = graph.consumers.get(aim, ())
    if len(readers) != 1 or aim in graph.outputs or aim in graph.captured or readers[0][1] != 0:
        return []
    node = readers[0][0]
    return rule_of(node).saturation(node, constants(graph, node))


def constants(graph: Graph, node: Node) -> Read:
    """Floating constants that a node reads, by position."""

    def read(i: int) -> Array | None:
        value = weight_of(graph, node.inputs[i]) if i < len(node.inputs) and node.inputs[i] else None
        return value if value is not None and value.dtype.kind == "f" else None

    return read
