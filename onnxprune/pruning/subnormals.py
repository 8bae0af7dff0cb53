"""Set subnormal weights of layers to 0: processors take many times as long over them, and outputs do not change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from onnxprune.graph.canonical import keeps_values
from onnxprune.graph.cost import multiplies
from onnxprune.graph.view import Graph
from onnxprune.io.elements import Array
from onnxprune.io.weights import Weight
from onnxprune.operators.registry import Move, rule_of

# Unsigned integers of the same width; half precision is excluded: it is meant for small numbers and runs in single.
_BITS: dict[str, type[np.unsignedinteger[Any]]] = {"float32": np.uint32, "float64": np.uint64}
# Elements processed together: they stay in the processor's cache.
_CHUNK = 1 << 16


class FlushedWeight(Weight):
    """Another weight with its subnormal values set to 0; no array is held between readings."""

    __slots__ = ("base",)

    def __init__(self, base: Weight) -> None:
        super().__init__(base.name, base.onnx_type, base.shape)
        self.base = base

    def read(self) -> Array:
        """Return the values, as a fresh array."""
        array = np.array(self.base.read())
        array[np.abs(array) < np.finfo(array.dtype).tiny] = 0
        return array


def flushed(graph: Graph) -> dict[str, tuple[FlushedWeight, int]]:
    """Return flushed versions of weights with subnormal values: {name: (weight, number of values set to 0)}.

    Only weights that layers alone read, directly or through movement, are flushed: a product with a value below 1.2e-38
    (single precision) vanishes beside any other, but a divisor does not, nor does a value that is scaled up before use.
    Weights are read one at a time.
    """
    weights = {}
    for name in _of_layers(graph):
        weight = graph.weights[name]
        bits = _BITS.get(weight.dtype.name)
        if bits is not None and (count := _subnormal(weight.read(), bits)):
            weights[name] = FlushedWeight(weight), count
    return weights


def _subnormal(array: Array, bits: type[np.unsignedinteger[Any]]) -> int:
    """Count the values that are neither 0 nor as large as the smallest normal number."""
    flat = np.ascontiguousarray(array).reshape(-1).view(bits)
    sign = bits(1) << bits(flat.itemsize * 8 - 1)
    smallest_normal = np.asarray(np.finfo(array.dtype).tiny, array.dtype).view(bits)[()]
    total = 0
    for start in range(0, flat.size, _CHUNK):
        # A magnitude of 0 becomes the largest number there is.
        magnitudes = (flat[start : start + _CHUNK] & ~sign) - bits(1)
        total += int(np.count_nonzero(magnitudes < smallest_normal - bits(1)))
    return total


def _of_layers(graph: Graph) -> Iterator[str]:
    """Return the weights that reach layers and no other operators, with their values."""
    external = {*graph.outputs, *graph.captured}
    for name in graph.weights:
        at = name
        while at not in external and (readers := graph.consumers.get(at)):
            if all(multiplies(node) for node, _ in readers):
                yield name
                break
            node, position = readers[0]
            if len(readers) > 1 or position or not keeps_values(node) or rule_of(node).moves is Move.CAST:
                break
            at = node.outputs[0]
