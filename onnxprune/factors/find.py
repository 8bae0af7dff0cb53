"""Which layers of a graph can be taken apart, and why the others stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onnxprune.factors.convolutions import Convolution
from onnxprune.factors.layer import Described, Layer, Operator, ShapeOf, Use
from onnxprune.factors.products import Embedding, Equation, Product, Recurrent
from onnxprune.graph.cost import is_layer
from onnxprune.graph.view import Graph, Node
from onnxprune.model.weights import Weight
from onnxprune.operators.registry import rule_of

OPERATORS: dict[tuple[str, str], Operator] = {
    ("", "Conv"): Convolution(),
    ("", "ConvTranspose"): Convolution(),
    ("", "MatMul"): Product(),
    ("", "Gemm"): Product(),
    ("com.microsoft", "FusedMatMul"): Product(),
    ("", "Einsum"): Equation(),
    ("", "LSTM"): Recurrent(),
    ("", "GRU"): Recurrent(),
    ("", "RNN"): Recurrent(),
    ("", "Gather"): Embedding(),
}


@dataclass(slots=True)
class Found:
    """Layers that can be taken apart, and why others cannot, {name of the node: reason}."""

    layers: list[Layer] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def find_layers(graph: Graph, shape: ShapeOf) -> Found:
    """Every weight that nodes of one kind read in one way.

    Args:
        graph: with weights that are computed from constants folded. shape: of every tensor at the probe sizes.
    """
    found = Found()
    by_weight: dict[str, Layer] = {}
    for node in graph.steps:
        if not _reads_weight(graph, node):
            continue
        operator = OPERATORS.get((node.domain, node.op))
        if operator is None:
            found.left[node.label] = f"{node.op} holds its weights in a way of its own"
            continue
        # A table that is looked up is no layer, and still a weight.
        for position in rule_of(node).weights[:2] or (0,):
            name = node.inputs[position] if position < len(node.inputs) else ""
            if name and _matrix(graph, name):
                _take(graph, node, position, operator, shape, found, by_weight)
    for name, layer in list(by_weight.items()):
        why = _shared(graph, layer)
        if why:
            found.left.update({use.node.label: why for use in layer.uses})
            del by_weight[name]
    found.layers = list(by_weight.values())
    return found


def _reads_weight(graph: Graph, node: Node) -> bool:
    if node.op == "Gather" and not node.domain:
        weight = graph.weights.get(node.inputs[0])
        return weight is not None and weight.dtype.kind in "fV" and len(weight.shape) == 2
    return is_layer(node, graph)


def _matrix(graph: Graph, name: str) -> bool:
    """Whether a tensor is a weight with two sides, stored or computed from stored ones."""
    if name in graph.weights:
        return len(graph.weights[name].shape) > 1
    producer = graph.producer.get(name)
    return producer is not None and all(not n or n in graph.weights for n in producer.inputs)


def _take(
    graph: Graph,
    node: Node,
    position: int,
    operator: Operator,
    shape: ShapeOf,
    found: Found,
    by_weight: dict[str, Layer],
) -> None:
    """Enter one weight of one node, or say why not."""
    name = node.inputs[position]
    label = node.label if position < 2 else f"{node.label} (state)"
    weight = graph.weights.get(name)
    why = _unfit(weight)
    shapes = [shape(n) if n else None for n in (*node.inputs, *node.outputs)]
    described: Described | str = why
    if not why:
        # Where one operand is the weight, the other one is the data.
        rule = rule_of(node)
        data = rule.data if rule.data not in rule.weights else 1 - position
        form = rule.form(node, shapes[: len(node.inputs)], data)
        described = operator.describe(node, position, form, shapes)
    if isinstance(described, str):
        found.left[label] = described
        return
    layer = by_weight.get(name)
    if layer is None:
        layer = by_weight[name] = Layer(node.label, name, position, operator, described)
    layer.uses.append(Use(node, described.geometry))


def _unfit(weight: Weight | None) -> str:
    if weight is None:
        return "its weight is computed from others (quantised, transposed)"
    if weight.dtype.kind not in "fV" or weight.dtype.itemsize < 2:
        return f"its weight is stored as {weight.dtype}"
    return "" if min(weight.shape, default=0) > 0 else "its weight is empty"


def _shared(graph: Graph, layer: Layer) -> str:
    """Why a weight cannot be replaced although every node that was entered could be; empty where it can."""
    readers = [(n.index, i) for n, i in graph.consumers.get(layer.weight, ())]
    own = {use.node.index for use in layer.uses}
    if any(index not in own or i != layer.position for index, i in readers):
        return "its weight is shared with a node that reads it in another way"
    if layer.weight in graph.captured or layer.weight in graph.outputs:
        return "its weight is also read elsewhere: by a body, or as an output"
    kinds = {(use.node.op, use.node.domain, _layout(use.node)) for use in layer.uses}
    if len(kinds) > 1:
        return "its weight is shared with a node that reads it in another way"
    return ""


def _layout(node: Node) -> tuple[Any, ...]:
    """What says how a weight is read: nodes that agree on it can read the same factors."""
    names = ("group", "transA", "transB", "equation", "hidden_size", "direction")
    return tuple(node.attrs.get(name) for name in names)
