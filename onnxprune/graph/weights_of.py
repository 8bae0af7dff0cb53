"""The value of a weight behind the small operators that it passes through before use."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.evaluate import evaluate
from onnxprune.graph.view import Graph, Node

# Weights pass through few operators before use; a longer way leads to an activation.
_DEEPEST = 12


def weight_of(graph: Graph, name: str, depth: int = _DEEPEST) -> NDArray[Any] | None:
    """The value of a weight that comes through a chain of small operators (Transpose, DequantizeLinear); else None."""
    if name in graph.weights:
        return graph.weights[name].read()
    node = graph.producer.get(name)
    if node is None or not depth:
        return None
    values: list[NDArray[Any] | None] = []
    for source in node.inputs:
        value = weight_of(graph, source, depth - 1) if source else None
        if source and value is None:
            return None
        values.append(value)
    if node.op == "DequantizeLinear":
        return _dequantized(node, values)
    results = evaluate(node, values)
    return np.asarray(results[node.outputs.index(name)]) if results else None


def _dequantized(node: Node, values: list[NDArray[Any] | None]) -> NDArray[Any] | None:
    """(codes - zero point) * scale; onnx's evaluator does not know the operator before opset 19."""
    codes, scale, zero = (*values, None)[:3]
    if codes is None or scale is None or codes.dtype.kind not in "iu":
        return None
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))

    def spread(setting: NDArray[Any]) -> NDArray[Any]:
        if setting.size == 1:
            return setting.reshape(())
        if block:
            return np.repeat(setting, block, axis=axis).take(np.arange(codes.shape[axis]), axis=axis)
        return setting.reshape([-1 if a == axis % codes.ndim else 1 for a in range(codes.ndim)])

    numbers = codes.astype(np.float32) - (0.0 if zero is None else spread(zero).astype(np.float32))
    return (numbers * spread(scale).astype(np.float32)).astype(scale.dtype)
