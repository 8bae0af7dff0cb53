"""Layers whose weights may become sparse: the weight as a matrix, and the reasons why others are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxprune.graph.cost import constant_source, is_layer
from onnxprune.graph.view import Graph, Node
from onnxprune.io.weights import Weight
from onnxprune.operators.contractions import Form, Scale
from onnxprune.operators.registry import rule_of
from onnxprune.recovery.targets import WeightSource
from onnxprune.sparsification.patterns import Pattern, Real, by_taps

ShapeOf = Callable[[str], Any]

SMALL = 256
"""Fewer elements are left out by default: their zeros save nothing."""
DEPTHWISE = "depthwise: a few weights per channel, and no kernel for zeros among them"
EMBEDDING = "an embedding: its rows are looked up and not multiplied"
FIRST = "the first layer, which reads the model's inputs"
LAST = "the last layer, which makes the model's outputs"
_SMALL = f"fewer than {SMALL} weights"
UNFIT = "no pattern of zeros fits: "
"""Prefix of the reasons of layers that the pattern does not fit."""


@dataclass(slots=True)
class SparseLayer:
    """One weight of one node as a matrix [parts, contracted, outputs], positions of the kernel outside of channels.

    Attributes:
        name: name of the node, with ``(state)`` for the recurrent weight.
        node: the node.
        form: the node as a matrix product.
        source: where the weight is stored.
        shape: of the matrix.
        default_reason: why the layer is left out unless it is named; empty where it is not.
    """

    name: str
    node: Node
    form: Form
    source: WeightSource
    shape: tuple[int, int, int]
    default_reason: str = ""
    _order: Any = None

    def __post_init__(self) -> None:
        self._order = by_taps(self.form.taps, self.shape[1]) if self.form.taps > 1 else None

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape))

    @property
    def channels(self) -> int:
        """The number of input channels of a part."""
        return self.shape[1] // self.form.taps

    @property
    def data(self) -> str:
        """The tensor that the weight is multiplied with; empty where it lies inside the operator."""
        position = self.form.data
        return self.node.inputs[position] if position < len(self.node.inputs) and self.form.weight != position else ""

    @property
    def names(self) -> tuple[str, str]:
        """The names that patterns are matched against."""
        return self.node.label, self.source.root

    def ordered(self, columns: Real, axis: int = 1) -> Real:
        """Return an array over the form's columns in the order of the matrix."""
        return columns if self._order is None else columns.take(self._order, axis=axis)

    def read(self, weights: Mapping[str, Weight]) -> Real:
        """Read the matrix in float64."""
        return self.ordered(self.form.matrix(self.source.read(weights)))

    def write(self, weights: MutableMapping[str, Weight], matrix: Real) -> None:
        """Write a matrix; codes keep their scale and their zero point, which stands for 0."""
        columns = matrix
        if self._order is not None:
            columns = np.empty_like(matrix)
            columns[:, self._order] = matrix
        restored = self.form.restore(columns, self.source.read(weights))
        self.source.write(weights, np.asarray(restored, np.float64), np.ones(()))

    def misfit(self, pattern: Pattern) -> str:
        """Return the reason why the pattern does not fit; empty where it does."""
        why = pattern.misfit(self.channels, self.shape[2])
        return f"{UNFIT}{why}" if why else ""


@dataclass(slots=True)
class LayerScan:
    """Layers that may become sparse, in the order of the graph, and why others may not, {name: reason}."""

    layers: list[SparseLayer] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)


def find_layers(graph: Graph, shape: ShapeOf) -> LayerScan:
    """Find the weights of all layers.

    Args:
        graph: the graph.
        shape: shape of every tensor at the probe sizes.
    """
    scan = LayerScan()
    first, last = _ends(graph)
    for node in graph.steps:
        if _looks_up(graph, node):
            scan.reasons[node.label], scan.ops[node.label] = EMBEDDING, node.op
            continue
        if not is_layer(node, graph):
            continue
        positions = [i for i in rule_of(node).weights if _is_matrix(graph, node, i, shape)]
        for number, position in enumerate(positions):
            name = node.label if not number else f"{node.label} (state)"
            scan.ops[name] = node.op
            layer = _layer(graph, node, position, shape, name)
            if isinstance(layer, str):
                scan.reasons[name] = layer
            elif layer is not None:
                layer.default_reason = _left_out(layer, node.index in first, node.index in last)
                scan.layers.append(layer)
    return scan


def _left_out(layer: SparseLayer, first: bool, last: bool) -> str:
    """Return why a layer is left out unless it is named."""
    parts, n, _ = layer.shape
    if parts > 1 and n == layer.form.taps:
        return DEPTHWISE
    if first:
        return FIRST
    if last:
        return LAST
    return _SMALL if layer.size < SMALL else ""


def _layer(graph: Graph, node: Node, position: int, shape: ShapeOf, name: str) -> SparseLayer | str | None:
    """Return one weight of a node as a layer, or why it cannot be one; None for scales of normalisations."""
    form = _form(graph, node, position, shape)
    if isinstance(form, Scale):
        return None
    if form is None:
        return f"{node.op} multiplies its weight in a way that is not known as a matrix product"
    source = WeightSource.of(graph, node.inputs[position])
    if isinstance(source, str):
        return _packed(graph, node.inputs[position]) or source
    if node.inputs[position] in graph.outputs:
        return "its weight is an output of the model"
    like = np.broadcast_to(np.float32(0), source.shape(graph.weights))
    return SparseLayer(name, node, form, source, form.matrix(like).shape)


def _packed(graph: Graph, name: str) -> str:
    """Return why codes without an operator that turns them into numbers cannot become sparse; empty for others."""
    root = constant_source(graph, name)
    weight = graph.weights.get(root or "")
    codes = weight is not None and (weight.dtype.kind not in "fV" or weight.dtype.itemsize < 2)
    if not codes or weight is None:
        return ""
    return (
        f"its weight is stored as codes ({weight.dtype}) that the operator itself decodes: sparsify before quantising"
    )


def _form(graph: Graph, node: Node, position: int, shape: ShapeOf) -> Form | None:
    """Return the node as a product of data with the weight at ``position``."""
    shapes = [shape(n) if n else None for n in node.inputs]
    rule = rule_of(node)
    # A recurrent weight is multiplied with the state, whose first value may be absent.
    for data in (*(i for i, n in enumerate(node.inputs) if n and i not in rule.weights), 0, 1, _STATE):
        form = rule.form(node, shapes, data) if data != position else None
        if form is not None and form.weight == position:
            return form
    return None


_STATE = 5


def _is_matrix(graph: Graph, node: Node, i: int, shape: ShapeOf) -> bool:
    if i >= len(node.inputs) or not node.inputs[i] or constant_source(graph, node.inputs[i]) is None:
        return False
    sizes = graph.weights[node.inputs[i]].shape if node.inputs[i] in graph.weights else shape(node.inputs[i])
    return sizes is None or len(sizes) > 1


def _looks_up(graph: Graph, node: Node) -> bool:
    """Return whether a node gathers rows of a table of weights."""
    factoring = rule_of(node).factoring
    weight = graph.weights.get(node.inputs[0]) if factoring is not None and factoring.looks_up else None
    return weight is not None and weight.dtype.kind in "fV" and len(weight.shape) == 2


def _ends(graph: Graph) -> tuple[set[int], set[int]]:
    """Return the nodes in front of which, and behind which, no layer lies on any way."""
    layers = {n.index for n in graph.nodes if is_layer(n, graph) or _looks_up(graph, n)}
    layers -= {n.index for n in graph.nodes if _is_scale(graph, n)}
    behind: set[str] = set()
    first = set()
    for node in graph.nodes:
        if any(i in behind for i in node.inputs):
            behind.update(o for o in node.outputs if o)
        elif node.index in layers:
            first.add(node.index)
        if node.index in layers:
            behind.update(o for o in node.outputs if o)
    before: set[str] = set()
    last = set()
    for node in reversed(graph.nodes):
        if any(o in before for o in node.outputs):
            before.update(i for i in node.inputs if i)
        elif node.index in layers:
            last.add(node.index)
        if node.index in layers:
            before.update(i for i in node.inputs if i)
    return first, last


def _is_scale(graph: Graph, node: Node) -> bool:
    """Return whether the weights of a node are vectors, as those of normalisations are."""
    sizes = [graph.weights[node.inputs[i]].shape for i in rule_of(node).weights if _stored(graph, node, i)]
    return bool(sizes) and all(len(size) < 2 for size in sizes)


def _stored(graph: Graph, node: Node, i: int) -> bool:
    return i < len(node.inputs) and node.inputs[i] in graph.weights


def labels(layers: Iterable[SparseLayer]) -> Iterator[str]:
    """Yield all names that patterns may match."""
    for layer in layers:
        yield from layer.names
