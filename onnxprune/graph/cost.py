"""Costs of layers: parameters (elements of their weights) and multiply-accumulates at the probe shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnxprune.graph.view import Graph, Node
from onnxprune.io import markers
from onnxprune.operators.registry import rule_of

ShapeOf = Callable[[str], Any]


def macs(node: Node, shape: ShapeOf) -> Any:
    """Count the multiply-accumulates of one node; 0 for operators without contraction or of unknown shapes.

    Sizes in ``shape`` may be arrays that broadcast, one entry per candidate, and then the result is such an array.
    Nodes in the body of a Loop or Scan count as often as it runs, once where the sizes do not determine how often; both
    branches of an If count.
    """
    if not node.outputs:
        return 0
    return node.repeats * rule_of(node).macs(node, _known(node.inputs, shape), _known(node.outputs[:1], shape)[0])


def known(shape: Any) -> bool:
    """Return whether a shape and all of its sizes are known."""
    return shape is not None and all(n is not None for n in shape)


def _known(names: Sequence[str], shape: ShapeOf) -> list[Any]:
    """Return shapes of tensors, None for those that are absent or not fully known."""
    shapes = [shape(name) if name else None for name in names]
    return [s if known(s) else None for s in shapes]


def multiplies(node: Node) -> bool:
    """Return whether an operator multiplies data with operands that may be weights of the model."""
    return bool(rule_of(node).weights)


def is_layer(node: Node, graph: Graph) -> bool:
    """Return whether a node contracts with a weight of the model, directly or by a short chain (dequantisation)."""
    return weight_position(node, graph) is not None


def weight_position(node: Node, graph: Graph) -> int | None:
    """Return the position of the weight that multiplies a layer's data, the last of several; None for other nodes."""
    inputs = node.inputs
    for i in reversed(rule_of(node).weights):
        if i < len(inputs) and inputs[i] and constant_source(graph, inputs[i]) is not None:
            return i
    return None


def constant_source(graph: Graph, name: str, depth: int = 6) -> str | None:
    """Return the weight behind a tensor through single-input operators, or None where it is an activation."""
    for _ in range(depth):
        if name in graph.weights:
            return name if graph.weights[name].shape else None
        producer = graph.producer.get(name)
        if producer is None or not producer.inputs or producer.domain == markers.DOMAIN:
            return None
        if any(n and n not in graph.weights for n in producer.inputs[1:]):
            return None
        name = producer.inputs[0]
    return None


def layer_weights(node: Node, graph: Graph) -> list[str]:
    """Return the names of the weights that a layer reads."""
    sources = [constant_source(graph, name) for name in node.inputs if name]
    return list(dict.fromkeys(name for name in sources if name is not None))


def out_channels(node: Node, graph: Graph, shape: ShapeOf) -> int:
    """Return the number of a layer's output channels; 0 where it is not known."""
    weight = weight_position(node, graph)
    if weight is None:
        return 0
    shapes = [shape(name) if name else None for name in node.inputs]
    out = shape(node.outputs[0]) if node.outputs[0] else None
    return int(rule_of(node).channels(node, shapes, out, weight))


def channel_axis(node: Node, graph: Graph, shape: ShapeOf) -> int | None:
    """Return the axis of a layer's output along which its channels lie, None where there is none."""
    weight, out = weight_position(node, graph), shape(node.outputs[0]) if node.outputs[0] else None
    if weight is None or not out:
        return None
    return rule_of(node).output_axis(node, [shape(n) if n else None for n in node.inputs], len(out), weight)
