"""Values of small tensors at the probe sizes, and limits on computation.

The size of a result is estimated before a node is evaluated, before onnx propagates values, and before a model is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.errors import ModelError, argument
from onnxprune.graph.evaluate import evaluate
from onnxprune.graph.view import Graph, Node
from onnxprune.io import markers
from onnxprune.io.weights import Weight
from onnxprune.operators.registry import Read, rule_of

INT_LIMIT, FLOAT_LIMIT = 1 << 20, 1 << 12


def size_of(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape."""
    return math.prod(shape)


class Shapes(Protocol):
    """Shapes by tensor name, computed on demand or held in a mapping."""

    def get(self, name: str, /) -> Any:
        """Return the shape of a tensor, None where it is not known."""


class Values:
    """Values of small tensors, filled node by node in graph order; weights are read on first access.

    With ``base``, the values of another walk over the same graph, only differing values are held and computed:
    a second binding of the dynamic sizes, or the pruned model, shares most values with the first.
    """

    def __init__(self, graph: Graph, base: Values | None = None) -> None:
        self._graph, self._base = graph, base
        self._known: dict[str, np.ndarray | Weight | None] = {}

    def get(self, name: str) -> np.ndarray | None:
        """Return the value of a tensor where it is known and small, else None."""
        if name in self._known:
            known = self._known[name]
            if known is not None and not isinstance(known, np.ndarray):
                self._known[name] = known = known.read()
            return known
        if self._base is not None:
            return self._base.get(name)
        weight = self._graph.weights.get(name)
        if weight is None:
            return None
        value = weight.read() if is_small(weight.shape, weight.dtype) else None
        self._known[name] = value
        return value

    def set(self, name: str, value: np.ndarray | None) -> None:
        """Set (or forget, with None) the value of a tensor."""
        self._known[name] = value

    def change(self, name: str, weight: Weight) -> None:
        """Set the changed value of a weight; it is read on demand."""
        self._known[name] = weight

    def differs(self, *names: str) -> bool:
        """Return whether the value of one of these tensors differs from the base."""
        return not self._known.keys().isdisjoint(names)

    def step(self, node: Node, shapes: Shapes) -> None:
        """Evaluate ``node`` where its inputs are known; ``shapes`` serves operators that read sizes."""
        if rule_of(node).reads_sizes:
            self._learn(node, [_size_value(node, shapes.get(node.inputs[0]))])
        elif node.op != "Constant" and (self._base is None or not self._known.keys().isdisjoint(node.inputs)):
            self._learn(node, self._evaluate(node, shapes))

    def _evaluate(self, node: Node, shapes: Shapes) -> Sequence[np.ndarray | None]:
        if node.op == markers.JOIN:
            condition = self.get(node.inputs[2])
            return () if condition is None else (self.get(node.inputs[0 if condition.ravel()[0] else 1]),)
        values = []
        for name in node.inputs:
            value = self.get(name) if name else None
            if name and value is None:
                return ()
            values.append(value)
        for name in node.outputs:
            if name and not _fits(shapes.get(name)):
                return ()
        return evaluate(node, values) or ()

    def _learn(self, node: Node, results: Sequence[np.ndarray | None]) -> None:
        if not results:  # nearly always, and then there is mostly nothing to forget
            if self._base is not None:
                self._known.update({n: None for n in node.outputs if n and self._base.get(n) is not None})
            return
        for i, name in enumerate(node.outputs):
            value = results[i] if i < len(results) else None
            if not isinstance(value, np.ndarray) or not is_small(value.shape, value.dtype):
                value = None
            if not name or (self._base is None and value is None):
                continue
            if self._base is None or not _equal(value, self._base.get(name)):
                self._known[name] = value


def _size_value(node: Node, shape: Any) -> np.ndarray | None:
    """Return the output of an operator that reads sizes for a tensor of this shape."""
    if shape is None:
        return None
    try:
        return rule_of(node).size_values(node, shape)
    except OverflowError:  # the number of elements has more than 64 bits
        return None


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    if a is b:
        return True
    if a.dtype != b.dtype:
        return False
    if a.size < 64 and a.dtype.kind in "iub":  # sizes: a handful of numbers, which Python compares faster
        return a.shape == b.shape and bool(a.tolist() == b.tolist())
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def is_small(shape: Sequence[int], dtype: np.dtype[Any]) -> bool:
    """Return whether a tensor is small enough to be a known value: integers up to 2^20 elements, floats up to 2^12."""
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
    elements: dict[str, Any] = field(default_factory=dict)
    """Shapes of the tensors in every sequence whose length is known, see ``Elements``."""
    idle: set[int] = field(default_factory=set)
    """Nodes in branches that are not taken at these sizes."""


def operands_at(node: Node, probe: Probe) -> tuple[list[Any], Read]:
    """Return the shapes of a node's inputs at a probe, and a function from their positions to their values."""
    names, values = node.inputs, probe.values
    shapes = [probe.shapes.get(n) if n else None for n in names]
    return shapes, lambda i: values.get(names[i]) if i < len(names) and names[i] else None


MOST_ELEMENTS = 1 << 31
"""Elements that a tensor may have at the probe sizes, which are small."""
_COMPUTED, _TIMES = 1 << 26, 16
"""Limits on the elements of values computed from constants: a number, and a multiple of the elements of all weights."""
_RUNS = 1 << 26
# Vectors of this length are no shapes; onnx propagates each entry of one as an object.
_VECTOR = 1 << 20
# Constants from here on may produce such vectors.
_SUSPICIOUS, _TO_THE_END = 1 << 12, (1 << 63) - 1


def check_extents(graph: Graph, probe: Probe) -> None:
    """Check that a machine can hold every tensor of the model, and run every node as often as the model asks.

    Raises:
        ModelError: it cannot; names the node.
    """
    num_stored = sum(size_of(weight.shape) for weight in graph.weights.values())
    constant: set[str] = set()
    for name, shape in probe.inputs.items():
        _check(f"input {name!r} has", shape, MOST_ELEMENTS)
    for node in graph.steps:
        if node.repeats > _RUNS:
            raise ModelError(
                f"node {node.label!r} ({node.kind}) would run {node.repeats:,} times in one run of the model",
                hint="Check the number of iterations of the Loop or Scan around it.",
            )
        computed = not node.domain and all(not n or n in constant or n in graph.weights for n in node.inputs)
        max_elements = max(_COMPUTED, _TIMES * num_stored) if computed else MOST_ELEMENTS
        for name in filter(None, node.outputs):
            if computed:
                constant.add(name)
            _check(
                f"node {node.label!r} ({node.op}) gives a tensor",
                probe.shapes.get(name),
                min(max_elements, MOST_ELEMENTS),
            )


def _check(what: str, shape: Sequence[int | None] | None, max_elements: int) -> None:
    if shape is None or None in shape:
        return
    elements = size_of([int(n or 0) for n in shape])
    if elements >= max_elements:
        raise ModelError(
            f"{what} the shape {list(shape)}: {elements:,} elements, where fewer than {max_elements:,} are allowed",
            hint=f"Check the sizes in the file, or give smaller {argument('input_shapes')}.",
        )


def propagates(proto: onnx.ModelProto) -> bool:
    """Return whether onnx can propagate values through a model within memory for sure: no long vectors."""
    infos = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    shapes = (info.type.tensor_type.shape.dim for info in infos if info.type.HasField("tensor_type"))
    if any(len(dims) == 1 and dims[0].dim_value > _VECTOR for dims in shapes):
        return False
    return all(n <= _SUSPICIOUS or n == _TO_THE_END for n in _integers(proto.graph))


def _integers(graph: onnx.GraphProto) -> Iterator[int]:
    """Yield the largest entry of every small constant of integers."""
    for tensor in _small_tensors(graph):
        if tensor.data_type in (TensorProto.INT64, TensorProto.INT32) and size_of(tensor.dims) <= 1024:
            try:
                value = onnx.numpy_helper.to_array(tensor)
            except (ValueError, TypeError):  # its data do not fit
                continue
            if value.size:
                yield int(value.max())
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (max([a.i, *a.ints]) for a in node.attribute if a.name in ("value_int", "value_ints"))


def _small_tensors(graph: onnx.GraphProto) -> Iterable[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (a.t for a in node.attribute if a.name == "value")


def has_long_vectors(probe: Probe) -> bool:
    """Return whether some vector is so long that onnx must not propagate its entries."""
    return any(s is not None and len(s) == 1 and (s[0] or 0) > _VECTOR for s in probe.shapes.values())
