"""The value of a weight behind the small operators that it passes through before use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.evaluate import evaluate
from onnxprune.graph.view import Graph, Node

# Weights pass through few operators before use; a longer way leads to an activation.
_DEEPEST = 12
# Integers that numpy itself does not have.
_NARROW = {"int4", "uint4", "int2", "uint2"}


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
        return dequantized(node, values)
    results = evaluate(node, values)
    return np.asarray(results[node.outputs.index(name)]) if results else None


def dequantized(node: Node, values: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """(codes - zero point) * scale; onnx's evaluator does not know the operator before opset 19."""
    codes, scale, zero = (*values, None)[:3]
    if codes is None or scale is None or (codes.dtype.kind not in "iu" and codes.dtype.name not in _NARROW):
        return None
    numbers = codes.astype(np.float32)
    if zero is not None:
        numbers -= spread_setting(node, zero, codes.shape).astype(np.float32)
    return (numbers * spread_setting(node, scale, codes.shape).astype(np.float32)).astype(scale.dtype)


def spread_setting(node: Node, setting: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """The scale or zero point of a DequantizeLinear so that it broadcasts against codes of this shape."""
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    if setting.size == 1:
        return setting.reshape(())
    if block:
        return np.repeat(setting, block, axis=axis).take(np.arange(shape[axis]), axis=axis)
    return setting.reshape([-1 if a == axis % len(shape) else 1 for a in range(len(shape))])
