"""Layers that can be factorized: nodes that read one weight, the weight as a kernel, and the factors to replace it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxprune.graph.cost import constant_source, is_layer
from onnxprune.graph.view import Graph, Node
from onnxprune.io.weights import Weight
from onnxprune.operators.factoring import Description, Factoring
from onnxprune.operators.kernels import Geometry, Shape
from onnxprune.operators.registry import rule_of

NUMBERS = "__numbers"
"""End of the names of constants that hold the numbers of codes, which a model has while it is factorized."""
ShapeOf = Callable[[str], Any]


# Multiply-accumulates that take as long as reading or writing an element of an activation, and as a node without work:
# with these the work of 242 factorized convolutions of four networks tells for 80 % of them whether they are faster
# (with 0 and 0, for 43 %).
_MACS_PER_ELEMENT, _MACS_PER_NODE = 100, 100_000


@dataclass(frozen=True, slots=True)
class Use:
    """One node that reads the weight, and the sizes it runs at."""

    node: Node
    geometry: Geometry


@dataclass(slots=True)
class Layer:
    """A weight that can be factorized.

    Attributes:
        name: name of the first node that reads it.
        weight: name of the weight.
        position: position of the weight among the nodes' inputs.
        factoring, description: replacement and description of the first node.
        uses: every node that reads it.
    """

    name: str
    weight: str
    position: int
    factoring: Factoring
    description: Description
    uses: list[Use] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        """Return the sizes of the kernel."""
        return self.description.shape

    def macs(self, stages: Sequence[Any]) -> int:
        """Return multiply-accumulates of stages in the place of every node that reads the weight."""
        return sum(use.node.repeats * use.geometry.macs(stages) for use in self.uses)

    def work(self, stages: Sequence[Any]) -> int:
        """Return multiply-accumulates of stages, with those that take as long as their activations and their start."""
        started = len(stages) * sum(use.node.repeats for use in self.uses)
        moved = sum(use.node.repeats * use.geometry.moved(stages) for use in self.uses)
        return self.macs(stages) + _MACS_PER_ELEMENT * moved + _MACS_PER_NODE * started

    @property
    def names(self) -> Iterator[str]:
        """Yield the names that patterns are matched against."""
        yield from (use.node.label for use in self.uses)
        yield self.weight.removesuffix(NUMBERS)


@dataclass(slots=True)
class LayerScan:
    """Layers that can be factorized, and why others cannot, {name of the node: reason}."""

    layers: list[Layer] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def find_layers(graph: Graph, shape: ShapeOf) -> LayerScan:
    """Find every weight that nodes of one kind read in one way.

    Args:
        graph: the graph, with weights computed from constants folded.
        shape: shape of every tensor at the probe sizes.
    """
    scan = LayerScan()
    by_weight: dict[str, Layer] = {}
    for node in graph.steps:
        if not _reads_weight(graph, node):
            continue
        factoring = rule_of(node).factoring
        if factoring is None:
            scan.reasons[node.label] = f"{node.op} stores its weights in an unsupported form"
            continue
        # A lookup table is not a layer, but a weight.
        for position in rule_of(node).weights[:2] or (0,):
            name = node.inputs[position] if position < len(node.inputs) else ""
            if name and _matrix(graph, name):
                _add_weight(graph, node, position, factoring, shape, scan, by_weight)
    for name, layer in list(by_weight.items()):
        why = _sharing_refusal(graph, layer)
        if why:
            scan.reasons.update({use.node.label: why for use in layer.uses})
            del by_weight[name]
    scan.layers = list(by_weight.values())
    return scan


def _reads_weight(graph: Graph, node: Node) -> bool:
    factoring = rule_of(node).factoring
    if factoring is not None and factoring.looks_up:
        weight = graph.weights.get(node.inputs[0])
        return weight is not None and weight.dtype.kind in "fV" and len(weight.shape) == 2
    return is_layer(node, graph)


def _matrix(graph: Graph, name: str) -> bool:
    """Return whether a tensor is a weight with two sides, stored or computed from stored ones."""
    source = constant_source(graph, name)
    return source is not None and len(graph.weights[source].shape) > 1


def _add_weight(
    graph: Graph,
    node: Node,
    position: int,
    factoring: Factoring,
    shape: ShapeOf,
    scan: LayerScan,
    by_weight: dict[str, Layer],
) -> None:
    """Add one weight of one node to the layers, or record why it cannot be factorized."""
    name = node.inputs[position]
    label = node.label if position < 2 else f"{node.label} (state)"
    weight = graph.weights.get(name)
    why = _weight_reason(weight)
    shapes = [shape(n) if n else None for n in (*node.inputs, *node.outputs)]
    described: Description | str = why
    if not why:
        # One operand is the weight, the other one is the data.
        rule = rule_of(node)
        data = rule.data if rule.data not in rule.weights else 1 - position
        form = rule.form(node, shapes[: len(node.inputs)], data)
        described = factoring.describe(node, position, form, shapes)
    if isinstance(described, str):
        scan.reasons[label] = described
        return
    layer = by_weight.get(name)
    if layer is None:
        layer = by_weight[name] = Layer(node.label, name, position, factoring, described)
    layer.uses.append(Use(node, described.geometry))


def _weight_reason(weight: Weight | None) -> str:
    if weight is None:
        return "its weight is computed from other tensors"
    if weight.dtype.kind not in "fV" or weight.dtype.itemsize < 2:
        return f"its weight is stored as {weight.dtype}"
    return "" if min(weight.shape, default=0) > 0 else "its weight is empty"


def _sharing_refusal(graph: Graph, layer: Layer) -> str:
    """Return the reason why a weight stays although each of its recorded nodes could be replaced; else empty."""
    readers = [(n.index, i) for n, i in graph.consumers.get(layer.weight, ())]
    layer_nodes = {use.node.index for use in layer.uses}
    if any(index not in layer_nodes or i != layer.position for index, i in readers):
        return "its weight is shared with a node that reads it differently"
    if layer.weight in graph.captured or layer.weight in graph.outputs:
        return "its weight is also read by a body, or is an output"
    kinds = {(use.node.op, use.node.domain, _layout(use.node)) for use in layer.uses}
    if len(kinds) > 1:
        return "its weight is shared with a node that reads it differently"
    return ""


def _layout(node: Node) -> tuple[Any, ...]:
    """Return a key of how a weight is read: nodes with equal keys can read the same factors."""
    factoring = rule_of(node).factoring
    return tuple(node.attrs.get(name) for name in factoring.layout) if factoring is not None else ()
