"""Targets of a recovery: every contraction, the tensor it is fitted to, and the path between the two.

The target of a layer is not its own output but the sum that reads it, so that a branch recovers errors of others.
"""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.canonical import keeps_values, weight_of
from onnxprune.graph.evaluate import evaluate
from onnxprune.graph.view import CONTROL, Graph, GraphEditor, Node
from onnxprune.io import markers
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.operators.codes import spread
from onnxprune.operators.contractions import Form, Pairwise, Scale
from onnxprune.operators.registry import Move, Read, Rule, lookup, rule_of
from onnxprune.recovery.regression import Real as RealArray

Array = NDArray[Any]
Real = NDArray[np.float64]

_SETTINGS = {1: "scale", 2: "zero_point"}


@dataclass(frozen=True, slots=True)
class WeightSource:
    """One constant that a node reads, whose values can be read and replaced.

    Attributes:
        root: name of the constant that holds the numbers or codes.
        chain: the operators between the root and its reader, in execution order.
        reader: the node that reads it and decodes codes itself, and the position of its input; None for others.
    """

    root: str
    chain: tuple[Node, ...] = ()
    reader: tuple[Node, int] | None = None

    @staticmethod
    def of(graph: Graph, name: str, reader: tuple[Node, int] | None = None) -> WeightSource | str:
        """Return the constant ``name``, or why it cannot be given new values; ``reader`` as the attribute."""
        chain: list[Node] = []
        if weight_of(graph, name) is None:
            return "its weight is computed from other tensors"
        while True:
            if len(graph.consumers.get(name, ())) != 1 or name in graph.captured:
                return "its weight is shared with another node"
            if name in graph.outputs:
                return "its weight is an output of the model"
            if name in graph.weights:
                return _checked(graph, WeightSource(name, tuple(reversed(chain)), reader))
            node = graph.producer.get(name)
            if node is None or not _can_undo(graph, node):
                return "its weight is computed from other tensors"
            chain.append(node)
            name = node.inputs[0]

    @property
    def quantised(self) -> Node | None:
        """The operator that dequantizes codes, if there is one."""
        decoder = next((node for node in self.chain if rule_of(node).decodes), None)
        return decoder if decoder is not None or self.reader is None else self.reader[0]

    def read(self, weights: Mapping[str, Weight]) -> Real:
        """Read the numbers as the contraction reads them."""
        return self._values(weights)[-1].astype(np.float64)

    def arranged(self, values: Array, weights: Mapping[str, Weight]) -> Real:
        """Return values of the root's elements where the contraction reads these; the chain must only rearrange."""
        overlay = ChainMap[str, Weight]({self.root: ArrayWeight(self.root, values)}, dict(weights))
        return self._values(overlay)[-1].astype(np.float64)

    def shape(self, weights: Mapping[str, Weight]) -> tuple[int, ...]:
        """Return the shape of the numbers."""
        return self._values(weights)[-1].shape if self.chain or self.reader else weights[self.root].shape

    def detach(self, editor: GraphEditor) -> None:
        """Copy the scale and zero point of codes where other nodes read them too."""
        node = self.quantised
        if node is None:
            return
        for at in sorted({**_SETTINGS, **dict.fromkeys(rule_of(node).settings, "setting")}):
            name = node.inputs[at] if at < len(node.inputs) else ""
            if name and len(editor.graph.consumers.get(name, ())) > 1:
                stem = f"{self.root}.{_SETTINGS.get(at, 'setting') if self.reader is None else f'setting{at}'}"
                copy = ArrayWeight(editor.unused_name(stem), editor.weights[name].read())
                editor.add_constant(copy)
                editor.connect(node, at, copy.name)

    def write(self, weights: MutableMapping[str, Weight], value: Real, ratio: Array | None = None) -> Array | None:
        """Write other numbers of the same shape.

        Codes get the scale, and unsigned ones the zero point, that uses all of their range; or, with ``ratio``, the
        old scale times it, as biases have whose scale has to be that of the product they are added to.

        Returns:
            new scales / old ones, where there are codes.
        """
        values = self._values(weights)
        scale_ratio = None
        if self.reader is not None:
            node, position = self.reader
            new = rule_of(node).encode(node, position, value, _reading(node, weights))
            assert new is not None  # asked when the constant was found
            for at, array in new.items():
                _set(weights, node.inputs[at], array)
            return None
        for node, inner in zip(reversed(self.chain), reversed(values[:-1]), strict=True):
            if rule_of(node).decodes:
                value, scale_ratio = _requantise(node, weights, inner, value, ratio)
            else:
                value = _undo(node, inner, value)
        _set(weights, self.root, value)
        return scale_ratio

    def _values(self, weights: Mapping[str, Weight]) -> list[Array]:
        """Return the root's value, and that behind every operator of the chain."""
        values: list[Array] = [weights[self.root].read()]
        for node in self.chain:
            result = _applied(node, [values[-1], *(weights[n].read() if n else None for n in node.inputs[1:])])
            assert result is not None  # it was computable when the constant was found
            values.append(result)
        if self.reader is not None:
            node, position = self.reader
            numbers = rule_of(node).numbers(node, position, values[-1], _reading(node, weights))
            assert numbers is not None
            values.append(numbers)
        return values


def _reading(node: Node, weights: Mapping[str, Weight]) -> Read:
    """Return a function from the position of an input to its value, where that is a constant."""

    def read(i: int) -> Array | None:
        name = node.inputs[i] if i < len(node.inputs) else ""
        return weights[name].read() if name in weights else None

    return read


def _decodes(graph: Graph, node: Node, position: int) -> bool:
    """Return whether a node decodes the constant at an input itself and can be given other numbers there."""
    rule, name = rule_of(node), node.inputs[position]
    if type(rule).encode is Rule.encode or name not in graph.weights:
        return False
    numbers = rule.numbers(node, position, graph.weights[name].read(), _reading(node, graph.weights))
    return numbers is not None and rule.encode(node, position, numbers, _reading(node, graph.weights)) is not None


def _applied(node: Node, operands: list[Array | None]) -> Array | None:
    results = evaluate(node, operands)
    return np.asarray(results[0]) if results else None


def _checked(graph: Graph, stored: WeightSource) -> WeightSource | str:
    weight = graph.weights[stored.root]
    code = stored.quantised
    if code is None and (weight.dtype.kind not in "fV" or weight.dtype.itemsize < 2):
        return f"its weight is stored as {weight.dtype}"
    return stored


def _can_undo(graph: Graph, node: Node) -> bool:
    constants = all(n in graph.weights for n in node.inputs[1:] if n)
    return constants and (rule_of(node).decodes or keeps_values(node))


def _undo(node: Node, inner: Array, value: Real) -> Real:
    """Return the value in front of an operator that only rearranges."""
    if rule_of(node).moves is not Move.ORDER:
        return value.reshape(inner.shape)
    places = evaluate(node, [np.arange(inner.size).reshape(inner.shape)])
    assert places is not None  # the values behind it were computable
    result = np.empty(inner.size)
    result[places[0].ravel()] = value.ravel()
    return result.reshape(inner.shape)


def _requantise(
    node: Node, weights: MutableMapping[str, Weight], codes: Array, value: Real, ratio: Array | None
) -> tuple[Real, Array]:
    """Return the codes of a value, with new scales and zero points in ``weights``, and new scales / old ones."""
    scale_name, zero_name = (*node.inputs, "")[1:3]
    old = weights[scale_name].read().astype(np.float64)
    zero = weights[zero_name].read().astype(np.float64) if zero_name else np.zeros_like(old)
    low, high = _range(codes.dtype)
    if ratio is not None:
        scale = old * ratio
    else:
        lows, highs = (_extremes(node, value, old, f) for f in (np.minimum, np.maximum))
        if low == 0 and zero_name:
            scale = (highs - lows) / (high - low)
            zero = np.clip(np.round(-lows / np.where(scale > 0, scale, 1.0)), low, high)
        else:
            down = np.where(zero > low, -lows / np.maximum(zero - low, 1.0), 0.0)
            # The lowest code has no opposite: symmetric codes do without it.
            down = np.where(zero == 0, -lows / high, down)
            scale = np.maximum(highs / np.maximum(high - zero, 1.0), down)
        scale = np.where(scale > 0, scale, old)
    _set(weights, scale_name, scale)
    if zero_name:
        _set(weights, zero_name, zero)
    scale = weights[scale_name].read().astype(np.float64)  # as it was rounded
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    wide, offset = (spread(setting, value.shape, axis, block) for setting in (scale, zero))
    return np.clip(np.rint(value / wide) + offset, low, high), scale / np.where(old == 0, 1.0, old)


def _range(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the lowest and the highest code."""
    info: Any = np.iinfo(dtype) if dtype.kind in "iu" else ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    return int(info.min), int(info.max)


def _extremes(node: Node, value: Real, like: Real, least_or_most: np.ufunc) -> Real:
    """Return the least or largest of 0 and the values that share a scale, in the scales' shape."""
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    if like.size == 1:
        extremes = np.asarray(least_or_most.reduce(value, axis=None)).reshape(like.shape)
    elif block:
        extremes = least_or_most.reduceat(value, np.arange(0, value.shape[axis], block), axis=axis)
    else:
        axis %= value.ndim
        extremes = least_or_most.reduce(value, axis=tuple(a for a in range(value.ndim) if a != axis))
    return np.asarray(least_or_most(extremes, 0.0), np.float64)


def _set(weights: MutableMapping[str, Weight], name: str, value: Real) -> None:
    """Set a constant to a new value in its own type."""
    weights[name] = ArrayWeight(name, np.asarray(value, order="C").astype(weights[name].dtype))


Undo = Callable[[Array, Sequence[Array], Sequence[int]], Array]
"""(value behind the operator, other addends, shape in front of it) -> value in front of it."""


@dataclass(slots=True)
class InvertiblePath:
    """Operators between a contraction's output and its target tensor.

    Attributes:
        target: name of the target tensor.
        undo: inverse operators from its value to the contraction's output, last operator first.
        addends: names of activations of the pruned model that are added on the path.
        nodes: the operators of the path.
        saturations: saturation edges of the activation that reads the target, (level, whether it saturates below).
        is_rearranged: whether an operator rearranges values.
        pooled: whether only a mean over positions reads the target, or the activation behind it.
    """

    target: str
    undo: list[tuple[Undo, int]] = field(default_factory=list)
    addends: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    saturations: list[tuple[float, bool]] = field(default_factory=list)
    is_rearranged: bool = False
    moves: list[Undo] = field(default_factory=list)
    pooled: bool = False

    def back(self, value: Array, addends: Sequence[Array], shape: Sequence[int]) -> Array:
        """Compute the output of the contraction for which the target tensor has ``value``."""
        for undo, number in reversed(self.undo):
            value = undo(value, addends[number : number + 1], shape)
        return value

    def moved_back(self, value: Array, shape: Sequence[int]) -> Array:
        """Rearrange a value of the target tensor to the layout of the contraction's output; nothing is computed."""
        for move in reversed(self.moves):
            value = move(value, (), shape)
        return value


def find_path(graph: Graph, start: str, ready: Callable[[str], bool], shape: Callable[[str], Any]) -> InvertiblePath:
    """Return the longest invertible chain of operators from ``start``, each the only reader of its input.

    Args:
        graph: graph of the model.
        start: output of a contraction.
        ready: function that returns whether a tensor is known before the contraction is recovered.
        shape: function that returns the shape of a tensor, or None.
    """
    path = InvertiblePath(start)
    while _extend(graph, path, ready, shape):
        pass
    path.saturations = _saturations(graph, path.target)
    path.pooled = not path.is_rearranged and _is_pooled(graph, path.target, shape)
    return path


def _is_pooled(graph: Graph, target: str, shape: Callable[[str], Any]) -> bool:
    """Return whether only a mean over positions reads the target, possibly behind a piecewise linear activation."""
    for _ in range(2):
        readers = graph.consumers.get(target, ())
        if len(readers) != 1 or target in graph.outputs or target in graph.captured:
            return False
        node = readers[0][0]
        if not rule_of(node).clamps:
            return _is_mean(node, shape)
        target = node.outputs[0]
    return False


def _extend(graph: Graph, path: InvertiblePath, ready: Callable[[str], bool], shape: Callable[[str], Any]) -> bool:
    """Extend the path by one operator; returns whether that was possible."""
    readers = graph.consumers.get(path.target, ())
    if len(readers) != 1 or path.target in graph.outputs or path.target in graph.captured:
        return False
    node, position = readers[0]
    rule = rule_of(node)
    inverse = rule.inverse(node, position, constants(graph, node)) if node.outputs[0] else None
    if inverse is None:
        return False
    # An operand must not widen the value: there would be no one value in front of it.
    if rule.moves is None and shape(path.target) != shape(node.outputs[0]):
        return False
    # A reshape is undone with the shape of the contraction's output: nothing may have moved before it.
    if rule.moves is Move.SHAPE and path.is_rearranged:
        return False
    addend = "" if inverse.addend is None else node.inputs[inverse.addend]
    if addend and not ready(addend):
        return False
    path.undo.append((inverse.undo, len(path.addends)))
    path.addends += [addend] if addend else []
    if rule.moves not in (None, Move.SAME):
        path.is_rearranged = True
        path.moves.append(inverse.undo)
    path.nodes.append(node)
    path.target = node.outputs[0]
    return True


def _is_mean(node: Node, shape: Callable[[str], Any]) -> bool:
    """Return whether the node takes the mean over all positions."""
    if not rule_of(node).averages:
        return False
    before, after = shape(node.inputs[0]), shape(node.outputs[0])
    if before is None or after is None or len(before) < 3 or tuple(after[:2]) != tuple(before[:2]):
        return False
    return all(n == 1 for n in after[2:]) and not any(node.attrs.get("pads") or ())


def _saturations(graph: Graph, target: str) -> list[tuple[float, bool]]:
    """Return the saturation edges of the activation that is the only reader of the target."""
    readers = graph.consumers.get(target, ())
    if len(readers) != 1 or target in graph.outputs or target in graph.captured or readers[0][1] != 0:
        return []
    node = readers[0][0]
    return rule_of(node).saturation(node, constants(graph, node))


def constants(graph: Graph, node: Node) -> Read:
    """Return the floating constants that a node reads, by position."""

    def read(i: int) -> Array | None:
        value = weight_of(graph, node.inputs[i]) if i < len(node.inputs) and node.inputs[i] else None
        return value if value is not None and value.dtype.kind == "f" else None

    return read


_UNSEEN = "it lies in an If within a Loop or Scan, and the size of its output is not known where that branch is not run"
_OUTSIDE = "it lies in a body and reads a tensor from outside: one value for all iterations"
_ACROSS = "it lies in a body, and the first axis of its data or output does not count samples"


class Subgraphs:
    """The bodies of the pruned graph, and the order of recovery of their layers.

    A layer in a Loop or Scan is fitted to the surviving inputs of the original: its inputs in the pruned model depend,
    through the states, on its own earlier outputs, so that a fit to those diverges.

    A Loop or Scan is recovered as one: behind all its inputs, ahead of all its outputs. A layer in the branch of an If
    is like any other layer, fitted to the samples that take the branch.

    Args:
        graph: the pruned graph.
        level: {tensor: level} so far, extended by the caller.
    """

    def __init__(self, graph: Graph, level: Mapping[str, int]) -> None:
        self._graph, self._level = graph, level
        self._around = graph.around if graph.has_bodies else []
        self._outer_values = {*graph.inputs, *graph.weights} if graph.has_bodies else set[str]()
        self._min_level: dict[int, int] = {}
        self._max_level: dict[int, int] = {}

    def min_level(self, node: Node) -> int:
        """Return the level of the inputs of the outermost Loop or Scan around ``node``."""
        start = self._start(node)
        if start is None:
            return 0
        if start not in self._min_level:
            self._min_level[start] = max((self._level.get(n, 0) for n in self._read(start)), default=0)
        if node.marker in markers.RESULTS and not self.encloses(node):
            return max(self._min_level[start], self._max_level.get(start, 0))
        return self._min_level[start]

    def record(self, node: Node, reach: int) -> None:
        """Record the level of ``node``."""
        start = self._start(node)
        if start is not None:
            self._max_level[start] = max(self._max_level.get(start, 0), reach)

    def refusal(self, node: Node, form: Form, comparable: Collection[str], shape: Callable[[str], Any]) -> str:
        """Return why a layer cannot be recovered in its body, or an empty string."""
        if not self.encloses(node):
            return ""
        data, result = node.inputs[form.data], node.outputs[0]
        conditions = (name for name, _ in self.where(node))
        if result not in comparable or not all(name in comparable or name in self._outer_values for name in conditions):
            return _UNSEEN
        # Every tensor around the node's branches has a value for every time that these are asked for.
        home = self._home(data)
        if data not in comparable or any(body.kind != "If" for body in self._bodies_of(node)[len(home) :]) or not home:
            return _OUTSIDE
        rank = len(shape(result) or ())
        across = rank < 2 or isinstance(form, Scale) or 0 in form.axes or form.output_axis(rank) == 0
        return _ACROSS if across else ""

    def encloses(self, node: Node) -> bool:
        """Return whether a node lies in a Loop or Scan."""
        return bool(self._around) and markers.repeating(self._around[node.index]) is not None

    def may_follow(self, node: Node, path: InvertiblePath) -> bool:
        """Return whether the path may be used: not across a Loop or Scan, nor in one to a sum with pruned addends."""
        if not self._around:
            return True
        return self.together(node, [path.target]) and not (path.addends and self.encloses(node))

    def where(self, node: Node) -> tuple[tuple[str, bool], ...]:
        """Return the conditions under which a node in a Loop or Scan runs in an iteration: (tensor, value)."""
        inner = [body for body in self._bodies_of(node) if body.kind == "If"]
        return tuple((self._graph.nodes[body.start].inputs[0], body.side) for body in inner)

    def together(self, node: Node, names: Iterable[str]) -> bool:
        """Return whether tensors have one value for every run of ``node``."""
        return not self._around or all(self._home(name) == self._bodies_of(node) for name in names)

    def _bodies_of(self, node: Node) -> tuple[markers.Body, ...]:
        """Return the bodies around a node, from the outermost Loop or Scan on."""
        return self._within(self._around[node.index]) if self._around else ()

    def _home(self, name: str) -> tuple[markers.Body, ...]:
        """Return the bodies around a tensor, from the outermost Loop or Scan on."""
        producer = self._graph.producer.get(name)
        if producer is None:
            return ()
        around = self._around[producer.index]
        opened = (markers.Body(producer.index, True, producer.kind),) if producer.marker == markers.OPEN else ()
        return self._within((*around, *opened))

    @staticmethod
    def _within(around: tuple[markers.Body, ...]) -> tuple[markers.Body, ...]:
        first = markers.repeating(around)
        return () if first is None else around[first:]

    def _start(self, node: Node) -> int | None:
        """Return the first marker's index of the outermost Loop or Scan around ``node`` or marked by it."""
        if not self._around:
            return None
        around = self._around[node.index]
        first = markers.repeating(around)
        if first is not None:
            return around[first].start
        if not node.marker or node.kind == "If":
            return None
        marker = node
        while marker.marker != markers.OPEN or self.encloses(marker):
            marker = self._graph.nodes[marker.index - 1]
        return marker.index

    def _read(self, start: int) -> Iterable[str]:
        outside = len(self._around[start])
        yield from self._graph.nodes[start].inputs
        for node in self._graph.nodes[start + 1 :]:
            yield from node.inputs
            if node.marker == markers.CLOSE and len(self._around[node.index]) == outside:
                return


Shapes = Callable[[str], Any]


@dataclass(slots=True)
class RecoveryTarget:
    """One contraction to recover.

    Attributes:
        node: node of the pruned graph.
        form: the node as a matrix product.
        path: path from its output to its target.
        level: targets of one level do not depend on each other; lower levels are recovered first.
        weight, bias: positions of its constants; None for a node without bias.
        recurrent: whether it lies in a Loop or Scan, see :class:`Subgraphs`.
        conditions: conditions of the iterations in which it runs there, (tensor, value).
    """

    node: Node
    form: Form
    path: InvertiblePath
    level: int
    weight: WeightSource
    bias: WeightSource | None = None
    recurrent: bool = False
    conditions: tuple[tuple[str, bool], ...] = ()

    @property
    def data(self) -> str:
        """The name of the contraction's input."""
        return self.node.inputs[self.form.data]

    @property
    def needs(self) -> tuple[str, ...]:
        """The tensors of the pruned model that the recovery of the contraction needs."""
        return () if self.recurrent else (self.data, *self.path.addends)


@dataclass(slots=True)
class RecoveryTargets:
    """All recovery targets in levels, and the reasons of contractions without one, {node: reason}."""

    levels: list[list[RecoveryTarget]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def reject(self, why: Callable[[RecoveryTarget], str]) -> None:
        """Drop the targets for which there is a reason."""
        reasons = {target.node.label: reason for level in self.levels for target in level if (reason := why(target))}
        self.reasons.update(reasons)
        self.keep(lambda target: target.node.label not in reasons)

    def keep(self, is_kept: Callable[[RecoveryTarget], bool]) -> None:
        """Drop all other targets."""
        levels = [[target for target in level if is_kept(target)] for level in self.levels]
        self.levels = [level for level in levels if level]


def find_targets(graph: Graph, comparable: Collection[str], shape: Shapes, *, joint: bool = True) -> RecoveryTargets:
    """Find every contraction of the pruned graph that can be recovered.

    Args:
        graph: the pruned graph.
        comparable: names of its tensors with comparable values in the original.
        shape: function that returns a shape in the pruned model.
        joint: fit to sums; False: fit every contraction to its own output.
    """
    targets = RecoveryTargets()
    level: dict[str, int] = dict.fromkeys(graph.inputs, 0)
    by_level: dict[int, list[RecoveryTarget]] = defaultdict(list)
    passed: set[int] = set()
    bodies = Subgraphs(graph, level)
    for node in graph.nodes:
        inputs = [n for n in node.inputs if n and n not in graph.weights]
        reach = max((level.get(n, 0) for n in inputs), default=0)
        if node.op in CONTROL:
            reach = max([reach, *(level.get(n, 0) for n in graph.captured)])
        reach = max(reach, bodies.min_level(node))
        # A BatchNormalization behind a contraction is undone there: its scale and shift are the contraction's to fit.
        form = _form(graph, node, shape) if node.index not in passed else None
        weight_and_bias = None if form is None else _weight_sources(graph, node, form)
        if form is not None:
            weight_and_bias = bodies.refusal(node, form, comparable, shape) or weight_and_bias
        if isinstance(weight_and_bias, str):
            targets.reasons[node.label] = weight_and_bias
        elif form is not None and weight_and_bias is not None:
            path = find_path(graph, node.outputs[0], level.__contains__ if joint else _never, shape)
            if path.target not in comparable or not bodies.may_follow(node, path):
                path = InvertiblePath(node.outputs[0])
            if path.target in comparable:
                reach = 1 + max([reach, *(level[n] for n in path.addends)])
                loop = bodies.encloses(node), bodies.where(node)
                by_level[reach].append(RecoveryTarget(node, form, path, reach, *weight_and_bias, *loop))
                passed.update(n.index for n in path.nodes)
        bodies.record(node, reach)
        for name in node.outputs:
            level[name] = reach
    targets.levels = [by_level[k] for k in sorted(by_level)]
    return targets


def _never(_name: str) -> bool:
    return False


def layer_target(graph: Graph, node: Node, shape: Shapes) -> RecoveryTarget | str:
    """Return one contraction as a target whose weights can be read and written, or why they cannot be changed.

    Args:
        graph: graph with the contraction.
        node: node of the contraction.
        shape: function that returns the shape of a tensor.
    """
    form = _form(graph, node, shape)
    if form is None:
        return "its weight is computed from other tensors"
    constants = _weight_sources(graph, node, form)
    if isinstance(constants, str):
        return constants
    return RecoveryTarget(node, form, InvertiblePath(node.outputs[0]), 0, *constants)


def _form(graph: Graph, node: Node, shape: Shapes) -> Form | None:
    """Return the node as a product of data and a constant weight."""
    form: Form | None = None
    candidates = [i for i in (0, 1) if i < len(node.inputs) and not _is_constant(graph, node.inputs[i])]
    rule = lookup(node.domain, node.op, node.version)
    shapes = [shape(n) if n else None for n in node.inputs]
    for position in candidates:
        form = form or rule.form(node, shapes, position)
    return form if form is not None and _is_constant(graph, node.inputs[form.weight]) else None


def outputs(form: Form, weight: Sequence[int]) -> int:
    """Return the number of outputs of a layer with a weight of this shape."""
    matrix = form.matrix(np.broadcast_to(np.float32(0), weight))
    return int(matrix.shape[0] * matrix.shape[2])


def _is_constant(graph: Graph, name: str) -> bool:
    return name in graph.weights or weight_of(graph, name) is not None


def _weight_sources(graph: Graph, node: Node, form: Form) -> tuple[WeightSource, WeightSource | None] | str:
    """Return the constants of a layer's weight and bias, or why they cannot be changed."""
    if not form.plain:
        return "its output is not a plain product of data and weight"
    if isinstance(form, Scale) and any(name not in graph.weights for name in node.inputs[2:5]):
        return "its shift or its statistics are computed from other tensors"  # quantized, for example
    reader = (node, form.weight) if _decodes(graph, node, form.weight) else None
    weight = WeightSource.of(graph, node.inputs[form.weight], reader)
    if isinstance(weight, str):
        return weight
    if form.bias is None or form.bias >= len(node.inputs) or not node.inputs[form.bias]:
        return weight, None
    bias = WeightSource.of(graph, node.inputs[form.bias])
    if isinstance(bias, str):
        return bias
    if bias.chain and prod(bias.shape(graph.weights)) != outputs(form, weight.shape(graph.weights)):
        return "its bias has one number for several outputs and is computed from other tensors"
    scales = [s.quantised.inputs[1] for s in (weight, bias) if s.quantised is not None]
    sizes = [prod(graph.weights[n].shape) for n in scales]
    # Runtimes add a quantised bias to the sum of codes as it is: its scale has to follow the weight's.
    if len(scales) == 2 and (sizes[0] not in (1, sizes[1]) or scales[0] == scales[1]):
        return "the scales of its quantised weight and bias do not fit together"
    return weight, bias


class Layer:
    """One contraction of a pruned model whose weights are read and written.

    Args:
        graph: graph of the pruned model.
        weights: weights of the pruned model, changed by ``write``.
        target: recovery target of the contraction.
    """

    def __init__(self, graph: Graph, weights: MutableMapping[str, Weight], target: RecoveryTarget) -> None:
        self._editor = GraphEditor(graph, weights)
        self._graph, self._weights, self.target = graph, weights, target
        self.node, self.form = target.node, target.form
        self._home = self._find_home()

    @property
    def fixed_bias(self) -> bool:
        """Whether the layer cannot take a bias."""
        return self._home is None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight as the layer reads it."""
        return self.target.weight.shape(self._weights)

    def read(self) -> tuple[RealArray, RealArray]:
        """Read the matrix [parts, n, o] and the bias [parts, o] that the layer applies, in float64."""
        weight = self.target.weight.read(self._weights)
        if isinstance(self.form, Scale):
            gain, mean = self._statistics()
            shift = self._weights[self.node.inputs[2]].read().astype(np.float64)
            scaled = weight * gain
            return scaled.reshape(-1, 1, 1), (shift - mean * scaled).reshape(-1, 1)
        matrix = self.form.matrix(weight) * self.form.scale
        bias = np.zeros((matrix.shape[0], matrix.shape[2]))
        if self.target.bias is not None:
            value = self.target.bias.read(self._weights) * self.form.bias_scale
            bias = np.broadcast_to(value.reshape(-1), (bias.size,)).reshape(bias.shape).copy()
        return matrix, bias

    def write(self, matrix: RealArray, bias: RealArray) -> None:
        """Write matrix and bias to the model, in the weights' own types; codes get new scales."""
        stored = self.target.weight
        for constant in (stored, self.target.bias):
            if constant is not None:
                constant.detach(self._editor)
        if isinstance(self.form, Scale):
            gain, mean = self._statistics()
            scaled = matrix.reshape(-1)
            stored.write(self._weights, np.divide(scaled, gain))
            name = self.node.inputs[2]
            self._set(name, bias.reshape(-1) + mean * scaled, self._weights[name].dtype)
            return
        restored = self.form.restore(matrix / self.form.scale, stored.read(self._weights))
        ratio = stored.write(self._weights, np.asarray(restored, np.float64))
        if self._home == "own":
            self._write_bias(bias.reshape(-1) / self.form.bias_scale, ratio)
        elif self._home is not None:
            # The bias of a product without one lies in the addition behind it: the change is added there.
            value = self._weights[self._home]
            extra = bias.reshape(-1)
            shape = value.shape if value.shape and value.shape[-1] == extra.size else (extra.size,)
            self._set(self._home, np.broadcast_to(value.read().astype(np.float64), shape) + extra, value.dtype)

    def as_stored(self, matrix: RealArray, bias: RealArray) -> tuple[RealArray, RealArray]:
        """Return the weights and biases as the layer would apply them once written: codes round them."""
        stored, bias_source = self.target.weight, self.target.bias
        if stored.quantised is None:
            return matrix, bias
        overlay = ChainMap[str, Weight]({}, self._weights)  # others write theirs meanwhile
        restored = self.form.restore(matrix / self.form.scale, stored.read(overlay))
        ratio = stored.write(overlay, np.asarray(restored, np.float64))
        rounded = self.form.matrix(stored.read(overlay)) * self.form.scale
        if bias_source is None or bias_source.quantised is None:
            return rounded, bias
        bias_source.write(overlay, (bias / self.form.bias_scale).reshape(bias_source.shape(overlay)), ratio)
        return rounded, bias_source.read(overlay).reshape(bias.shape) * self.form.bias_scale

    @property
    def _bias_shape(self) -> tuple[int, ...]:
        """The shape of a bias of one number per output: a column where outputs lie along the first of two axes."""
        is_column = isinstance(self.form, Pairwise) and len(self.form.terms[2]) == 2 and self.form.output_axis(2) == 0
        return (-1, 1) if is_column else (-1,)

    def _write_bias(self, bias: RealArray, ratio: RealArray | None) -> None:
        stored = self.target.bias
        if stored is not None and stored.chain:
            stored.write(self._weights, bias.reshape(stored.shape(self._weights)), ratio)
            return
        dtype = self._weights[self.target.weight.root].dtype if stored is None else self._weights[stored.root].dtype
        if stored is not None:
            shape = self._weights[stored.root].shape
            self._set(stored.root, bias.reshape(shape if prod(shape) == bias.size else self._bias_shape), dtype)
            return
        if not bias.any():
            return
        name = self._editor.unused_name(f"{self.node.inputs[self.form.weight]}.bias")
        position = self.form.bias
        assert position is not None
        self._editor.add_constant(ArrayWeight(name, bias.astype(dtype).reshape(self._bias_shape)))
        self._editor.connect(self.node, position, name)

    def _set(self, name: str, value: RealArray, dtype: np.dtype[np.generic]) -> None:
        self._editor.reshape_constant(ArrayWeight(name, np.ascontiguousarray(value.astype(dtype))))

    def _statistics(self) -> tuple[RealArray, RealArray]:
        """Return 1 / standard deviation and the mean of a BatchNormalization."""
        mean, variance = (self._weights[n].read().astype(np.float64) for n in self.node.inputs[3:5])
        return 1.0 / np.sqrt(variance + float(self.node.attrs.get("epsilon", 1e-5))), mean

    def _find_home(self) -> str | None:
        """Return the place of a bias: ``own``, the name of a constant that is added right behind, or None."""
        if self.form.bias is not None:
            # A float bias behind codes would prevent runtimes from multiplying the layer in integers.
            return None if self.target.bias is None and self.target.weight.quantised is not None else "own"
        if not isinstance(self.form, Pairwise):
            return None
        # A constant that is added lies along the last axis: outputs have to lie there too.
        rank = len(self.form.terms[2])
        return self._added_behind() if self.form.output_axis(rank) == rank - 1 else None

    def _added_behind(self) -> str | None:
        readers = self._graph.consumers.get(self.node.outputs[0], ())
        if len(readers) != 1 or readers[0][0].op != "Add" or self.node.outputs[0] in self._graph.outputs:
            return None
        reader: Node = readers[0][0]
        name = reader.inputs[1 - readers[0][1]]
        weight = self._weights.get(name)
        alone = len(self._graph.consumers.get(name, ())) == 1
        alone = alone and name not in self._graph.captured and name not in self._graph.outputs
        is_bias = weight is not None and alone and weight.dtype.kind == "f" and all(n == 1 for n in weight.shape[:-1])
        return name if is_bias else None
