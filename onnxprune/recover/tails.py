"""From a contraction's output on to where it is best judged: through operators that can be undone.

A layer is not aimed at its own output but at the sum it goes into, so that a branch repairs what other branches lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Graph, Node
from onnxprune.graph.weights_of import weight_of

Array = NDArray[Any]
Undo = Callable[[Array, Sequence[Array], Sequence[int]], Array]
"""(value behind the operator, other addends, shape in front of it) -> value in front of it."""

_RESHAPES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
_SAME = {"Identity", "Dropout"}
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Sum"}


@dataclass(slots=True)
class Tail:
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


def tail_of(graph: Graph, start: str, ready: Callable[[str], bool], shape: Callable[[str], Any]) -> Tail:
    """As far as the value of ``start`` is only passed on, read by one operator at a time, and can be had back.

    Args:
        ready: whether an activation can be known before the contraction that gives ``start`` is repaired.
        shape: shapes of tensors.
    """
    tail = Tail(start)
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
        if node.op not in ("Relu", "Clip") or node.domain:
            return _is_mean(node, shape)
        aim = node.outputs[0]
    return False


def _extend(graph: Graph, tail: Tail, ready: Callable[[str], bool], shape: Callable[[str], Any]) -> bool:
    """Go one operator further; whether that was possible."""
    readers = graph.consumers.get(tail.aim, ())
    if len(readers) != 1 or tail.aim in graph.outputs or tail.aim in graph.captured:
        return False
    node, position = readers[0]
    before = len(tail.addends)
    undo = _undo(graph, node, position, ready, tail)
    # An operand must not widen the value: there would be no one value in front of it.
    if undo is None or (node.op in _ELEMENTWISE and shape(tail.aim) != shape(node.outputs[0])):
        del tail.addends[before:]
        return False
    tail.undo.append((undo, before))
    if node.op in _RESHAPES or node.op == "Transpose":
        tail.moves.append(undo)
    tail.through.append(node)
    tail.aim = node.outputs[0]
    return True


def _is_mean(node: Node, shape: Callable[[str], Any]) -> bool:
    """Whether the node takes the mean over all positions."""
    if node.domain or node.op not in ("GlobalAveragePool", "AveragePool", "ReduceMean"):
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
    if node.op == "Relu":
        return [(0.0, True)]
    if node.op == "HardSwish":
        return [(-3.0, True)]
    if node.op == "HardSigmoid":
        slope, shift = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
        return [(-shift / slope, True), ((1.0 - shift) / slope, False)] if slope > 0 else []
    return _clip_flats(graph, node) if node.op == "Clip" else []


def _clip_flats(graph: Graph, node: Node) -> list[tuple[float, bool]]:
    bounds = []
    for position, name in enumerate(("min", "max"), start=1):
        value = node.attrs.get(name)
        if value is None and position < len(node.inputs) and node.inputs[position]:
            given = weight_of(graph, node.inputs[position])
            if given is None or given.size != 1:
                return []
            value = given.reshape(())
        if value is not None and np.isfinite(float(value)) and abs(float(value)) < 1e30:
            bounds.append((float(value), position == 1))
    return bounds


def _undo(graph: Graph, node: Node, position: int, ready: Callable[[str], bool], tail: Tail) -> Undo | None:
    if node.domain or not node.outputs[0]:
        return None
    if node.op in _SAME and position == 0 and not any(node.outputs[1:]):
        return lambda value, _addends, _shape: value
    if node.op == "Transpose":
        return _untranspose(node, tail)
    # A reshape is undone with the shape of the contraction's output: nothing may have moved before it.
    if node.op in _RESHAPES and position == 0 and not tail.moved:
        tail.moved = True
        return lambda value, _addends, shape: value.reshape(shape)
    if node.op == "BatchNormalization" and position == 0:
        return _unnormalise(graph, node)
    if node.op in _ELEMENTWISE and len(node.inputs) == 2:
        constant = _constant(graph, node.inputs[1 - position])
        if constant is not None:
            return _unscale(node, position, constant)
        if node.op in ("Add", "Sub", "Sum") and ready(node.inputs[1 - position]):
            tail.addends.append(node.inputs[1 - position])
            return _unadd(node, position)
    return None


def _constant(graph: Graph, name: str) -> Array | None:
    value = weight_of(graph, name)
    return value if value is not None and value.dtype.kind == "f" else None


def _untranspose(node: Node, tail: Tail) -> Undo | None:
    perm = node.attrs.get("perm")
    if perm is None:
        return None
    back = np.argsort(perm)
    tail.moved = True
    return lambda value, _addends, _shape: value.transpose(back)


def _unadd(node: Node, position: int) -> Undo:
    if node.op == "Sub" and position == 1:
        return lambda value, addends, _shape: addends[0] - value
    if node.op == "Sub":
        return lambda value, addends, _shape: value + addends[0]
    return lambda value, addends, _shape: value - addends[0]


def _unscale(node: Node, position: int, constant: Array) -> Undo | None:
    """Undo a constant operand, which must not widen the value."""
    if node.op in ("Add", "Sum"):
        return lambda value, _addends, _shape: value - constant
    if node.op == "Sub":
        return lambda value, _addends, _shape: constant - value if position else value + constant
    if node.op == "Mul":
        return lambda value, _addends, _shape: _divide(value, constant)
    return None if position else lambda value, _addends, _shape: value * constant


def _unnormalise(graph: Graph, node: Node) -> Undo | None:
    if node.attrs.get("training_mode", 0) or any(node.outputs[1:]):
        return None
    given = [g for n in node.inputs[1:5] if (g := _constant(graph, n)) is not None]
    if len(given) < 4:
        return None
    scale, shift, mean, variance = (np.asarray(g, np.float64) for g in given)
    gain = scale / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
    offset = shift - mean * gain

    def undo(value: Array, _addends: Sequence[Array], _shape: Sequence[int]) -> Array:
        along = (1, -1, *(1,) * (value.ndim - 2))
        return _divide(value - offset.reshape(along), gain.reshape(along))

    return undo


def _divide(value: Array, gain: Array) -> Array:
    """value / gain, 0 where the gain is 0: nothing in front of it can change what is behind."""
    dead = np.abs(gain) < 1e-12
    return np.where(dead, 0.0, value / np.where(dead, 1.0, gain))
