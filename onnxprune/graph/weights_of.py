"""The value of a weight behind the small operators that it passes through before use."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.evaluate import evaluate
from onnxprune.graph.view import Graph

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
    results = evaluate(node, values)
    return np.asarray(results[node.outputs.index(name)]) if results else None
