"""Values of small tensors and what else is known at one binding of the dynamic sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from onnxprune.graph.evaluate import evaluate
from onnxprune.graph.view import Graph, Node

INT_LIMIT, FLOAT_LIMIT = 1 << 20, 1 << 12


def size_of(shape: Sequence[int]) -> int:
    """Number of elements of a shape."""
    return math.prod(shape)


class Shapes(Protocol):
    """Shapes by tensor name, computed when asked for or held in a mapping."""

    def get(self, name: str, /) -> Any:
        """The shape of a tensor, None where it is not known."""


class Values:
    """Values of small tensors, filled node by node in graph order; weights are read when first asked for."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[str, np.ndarray | None] = {}

    def get(self, name: str) -> np.ndarray | None:
        """The value of a tensor where it is known and small, else None."""
        if name in self._known:
            return self._known[name]
        weight = self._graph.weights.get(name)
        if weight is None or not small(weight.shape, weight.dtype):
            if weight is not None:
                self._known[name] = None
            return None
        return self._known.setdefault(name, weight.read())

    def set(self, name: str, value: np.ndarray | None) -> None:
        """State (or forget, with None) the value of a tensor."""
        self._known[name] = value

    def step(self, node: Node, shapes: Shapes) -> None:
        """Evaluate ``node`` where its inputs are known; ``shapes`` serves Shape and Size."""
        if node.op in ("Shape", "Size") and node.domain == "":
            self._shape(node, shapes.get(node.inputs[0]))
            return
        if node.op == "Constant" and node.domain == "":
            return
        values = []
        for name in node.inputs:
            value = self.get(name) if name else None
            if name and value is None:
                return
            values.append(value)
        if any(not _fits(shapes.get(o)) for o in node.outputs if o):
            return
        results = evaluate(node, values)
        for name, value in zip(node.outputs, results or (), strict=False):
            if name and isinstance(value, np.ndarray) and small(value.shape, value.dtype):
                self._known[name] = value

    def _shape(self, node: Node, shape: Any) -> None:
        if shape is None:
            return
        if node.op == "Size":
            if None not in shape:
                self._known[node.outputs[0]] = np.asarray(int(np.prod(shape)), dtype=np.int64)
            return
        part = shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))]
        if None not in part:
            self._known[node.outputs[0]] = np.asarray(part, dtype=np.int64)


def small(shape: Sequence[int], dtype: np.dtype[Any]) -> bool:
    """Whether a tensor is small enough to be a known value: integers up to 2^20 elements, floats up to 2^12."""
    size = size_of(shape)
    return size <= (INT_LIMIT if dtype.kind in "iub" else FLOAT_LIMIT)


def _fits(shape: Any) -> bool:
    return shape is None or None in shape or size_of(shape) <= INT_LIMIT


@dataclass(slots=True)
class Probe:
    """Shapes and values at one binding of the dynamic dimensions; a shape is None where even its rank is unknown."""

    inputs: dict[str, tuple[int, ...]]
    shapes: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    values: Values = None  # type: ignore[assignment]
    sizes: set[str] = field(default_factory=set)
    """Known tensors that were computed from the sizes of others, directly or not."""
