"""The numbers that integer weights stand for, so that they are scored by size and not by code."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Graph, Node

# (operator, position of the codes): positions of scale (None: it has none) and zero point, and their axis.
_READERS: dict[tuple[str, int], tuple[int | None, int, int | None]] = {
    ("DequantizeLinear", 0): (1, 2, None),
    ("QLinearConv", 3): (4, 5, 0),
    ("ConvInteger", 1): (None, 3, 0),
    ("QLinearMatMul", 0): (1, 2, -2),
    ("QLinearMatMul", 3): (4, 5, -1),
    ("MatMulInteger", 1): (None, 3, -1),
    ("MatMulIntegerToFloat", 1): (3, 5, -1),
    ("DynamicQuantizeMatMul", 1): (2, 3, -1),
    ("QGemm", 3): (4, 5, None),
    ("QAttention", 1): (4, 7, 1),
}
_SETTINGS = {(op, i) for (op, _), (scale, zero, _) in _READERS.items() for i in (scale, zero) if i is not None}
# Packed codes mean nothing as bytes; the scales of their blocks stand for them.
_SETTINGS |= {("QuantizeLinear", 1), ("QuantizeLinear", 2), ("MatMulNBits", 1), ("MatMulNBits", 3)}


def is_setting(graph: Graph, name: str) -> bool:
    """Whether a weight is only read as scale, zero point or codes packed into bytes, and says nothing by itself."""
    readers = graph.consumers.get(name, ())
    for node, i in readers:
        if (node.op, i) not in _SETTINGS:
            return False
    return bool(readers)


def real_values(graph: Graph, name: str, codes: NDArray[Any]) -> NDArray[Any]:
    """The weight ``name`` as numbers, float32: (codes - zero point) * scale, by the first node that reads it.

    Codes whose scale or zero point is not a constant, and weights that no such node reads, are returned as they are.
    """
    for node, position in graph.consumers.get(name, ()):
        reader = _READERS.get((node.op, position))
        if reader is None:
            continue
        scale_at, zero_at, axis = reader
        if axis is None:
            axis = _axis(node)
        scale, zero = (_operand(graph, node, i, codes, axis) for i in (scale_at, zero_at))
        if scale is None or zero is None:
            continue
        return (codes.astype(np.float32) - zero) * scale
    return codes


def _axis(node: Node) -> int:
    if node.op == "QGemm":
        return 0 if node.attrs.get("transB", 0) else 1
    return int(node.attrs.get("axis", 1))


def _operand(
    graph: Graph, node: Node, position: int | None, codes: NDArray[Any], axis: int
) -> NDArray[np.float32] | None:
    """A scale or zero point that broadcasts against the codes; 1 or 0 where there is none, None if computed."""
    if position is None:
        return np.ones((), np.float32)
    if position >= len(node.inputs) or not node.inputs[position]:
        return np.zeros((), np.float32)
    weight = graph.weights.get(node.inputs[position])
    if weight is None:
        return None
    value = weight.read().astype(np.float32)
    if value.size == 1:
        return value.reshape(())
    if value.ndim == 1:
        shape = [1] * codes.ndim
        shape[axis] = value.size
        return value.reshape(shape)
    # One value per block of the axis, else per position.
    size, blocks = codes.shape[axis], value.shape[axis]
    if blocks not in (1, size):
        block = int(node.attrs.get("block_size", -(-size // blocks)))
        value = value.take(np.arange(size) // block, axis=axis)
    return value
