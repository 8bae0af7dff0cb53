"""What a layer costs: parameters (elements of its weights) and multiply-accumulates at the probe shape."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from onnxprune.graph.view import Graph, Node
from onnxprune.model import markers

ShapeOf = Callable[[str], Any]
# Operators with weights of their own: (position of the data, position of the weight).
LAYERS: dict[str, tuple[int, int]] = {
    "Conv": (0, 1),
    "ConvTranspose": (0, 1),
    "FusedConv": (0, 1),
    "ConvInteger": (0, 1),
    "QLinearConv": (0, 3),
    "Gemm": (0, 1),
    "FusedGemm": (0, 1),
    "MatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
    "Einsum": (0, 1),
    "LSTM": (0, 1),
    "GRU": (0, 1),
    "RNN": (0, 1),
    "Attention": (0, 1),
    "QAttention": (0, 1),
    "PackedAttention": (0, 1),
    "MoE": (0, 2),
}
_CONVOLUTIONS = {"Conv", "FusedConv", "ConvInteger", "QLinearConv"}
_RECURRENT = {"LSTM", "GRU", "RNN"}
_ATTENTION = {"Attention", "QAttention", "PackedAttention"}


def macs(node: Node, shape: ShapeOf) -> Any:
    """Multiply-accumulates of one node; 0 for operators that do not contract or whose shapes are not known.

    Sizes in ``shape`` may be arrays that broadcast, for many cuts at once: so is the result. What lies in the body of a
    Loop or Scan counts as often as it runs, once where the sizes do not say how often; both branches of an If count.
    """
    return node.repeats * _once(node, shape)


def _once(node: Node, shape: ShapeOf) -> Any:
    positions = LAYERS.get(node.op)
    if positions is None or len(node.inputs) <= positions[1] or not node.outputs[0]:
        return _recurrent_without_output(node, shape)
    data, weight, out = (shape(n) for n in (node.inputs[positions[0]], node.inputs[positions[1]], node.outputs[0]))
    if not (known(data) and known(weight) and known(out)):
        return 0
    if node.op in _CONVOLUTIONS:
        return prod(out) * prod(weight[1:])
    if node.op == "ConvTranspose":
        return prod(data) * prod(weight[1:])
    if node.op in _RECURRENT:
        return _recurrent(node, data, shape)
    if node.op == "Einsum":
        return _einsum(node, [shape(n) for n in node.inputs])
    if node.op in _ATTENTION:
        return prod(data[:-1]) * prod(weight)
    if node.op == "MoE":
        return _experts(node, data, shape)
    if node.op in ("Gemm", "FusedGemm") and node.attrs.get("transA", 0):
        return prod(out) * data[0]
    return prod(out) * data[-1]


def known(shape: Any) -> bool:
    """Whether a shape and all of its sizes are known."""
    return shape is not None and all(n is not None for n in shape)


def _recurrent_without_output(node: Node, shape: ShapeOf) -> Any:
    if node.op in _RECURRENT:
        data = shape(node.inputs[0])
        return _recurrent(node, data, shape) if known(data) else 0
    return 0


def _recurrent(node: Node, data: tuple[Any, ...], shape: ShapeOf) -> Any:
    sizes = [shape(name) for name in node.inputs[1:3]]
    return prod(data[:2]) * sum(prod(s) for s in sizes if known(s))


def _experts(node: Node, data: tuple[Any, ...], shape: ShapeOf) -> Any:
    """Every token goes through the layers of ``k`` experts, whose weights are [experts, ...]."""
    sizes = [shape(name) for name in node.inputs[2::2] if name]
    return prod(data[:-1]) * int(node.attrs.get("k", 1)) * sum(prod(s[1:]) for s in sizes if known(s))


def _einsum(node: Node, shapes: list[Any]) -> Any:
    terms = node.attrs.get("equation", "").replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, Any] = {}
    for term, shape in zip(terms, shapes, strict=False):
        if "." in term or not known(shape):
            return 0
        sizes.update(zip(term, shape, strict=False))
    return prod(sizes.values()) if len(terms) > 1 else 0


def is_layer(node: Node, graph: Graph) -> bool:
    """Whether a node contracts with a weight of the model, directly or through a short chain (dequantisation)."""
    positions = LAYERS.get(node.op)
    return positions is not None and any(constant_source(graph, n) is not None for n in node.inputs[:4] if n)


def constant_source(graph: Graph, name: str, depth: int = 6) -> str | None:
    """The weight that a tensor is made of by single-input operators, or None where it is an activation."""
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
    """Names of the weights that a layer reads."""
    found = [constant_source(graph, name) for name in node.inputs if name]
    return list(dict.fromkeys(name for name in found if name is not None))


def out_channels(node: Node, shape: ShapeOf) -> int:
    """Channels of a layer's output: axis 1 of a convolution, hidden size of a recurrent layer, else the last axis."""
    if node.op in _RECURRENT:
        weight = shape(node.inputs[2])
        return int(weight[-1]) if weight else 0
    out = shape(node.outputs[0])
    if not out:
        return 0
    return int(out[channel_axis(node, len(out))] or 0)


def channel_axis(node: Node, rank: int) -> int:
    """Axis of a layer's output along which its channels lie: 1 after a convolution, else the last."""
    return 1 if rank > 1 and (node.op in _CONVOLUTIONS or node.op == "ConvTranspose") else rank - 1
