"""What a model costs as a function of how many steps every group keeps: MACs, parameters, bytes, memory at its peak."""

from __future__ import annotations

from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.budget.memory import Memory
from onnxprune.budget.sizes import Counts, Sizes
from onnxprune.graph import cost
from onnxprune.model.elements import PACKED_BITS
from onnxprune.model.weights import Weight

Costs = NDArray[np.float64]


class Cost(Protocol):
    """A cost of the model. The model costs what its dearest row does: a peak has one row per moment, a sum one row."""

    def rows(self, kept: Counts) -> Costs:
        """Costs [cuts, rows] for counts [cuts, groups] of kept steps."""
        ...


class Macs:
    """Multiply-accumulates at the first probe's shapes, one row."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        graph = sizes.analysis.graph
        layers = [node for node in graph.nodes if cost.is_layer(node, graph)]
        names = {n.index: (*n.inputs, *n.outputs) for n in layers}
        self._moving = [n for n in layers if any(sizes.touched(name) for name in names[n.index])]
        moving = {n.index for n in self._moving}
        self._fixed = sum(cost.macs(n, sizes.analysis.facts.shape) for n in layers if n.index not in moving)

    def rows(self, kept: Counts) -> Costs:
        """Multiply-accumulates [cuts, 1]."""
        shape = self._sizes.at(kept)
        total = sum((cost.macs(node, shape) for node in self._moving), start=np.full(len(kept), self._fixed))
        return np.asarray(total, dtype=np.float64)[:, None]


class Stored:
    """Elements or bytes of all weights, one row.

    Constants that a cut adds, and the few bytes by which names and shapes in the file change, are not counted.

    Args:
        what: ``params``, ``size`` (the file's bytes) or ``weights`` (bytes of the weights alone).
    """

    def __init__(self, sizes: Sizes, what: str) -> None:
        self._sizes, self._what = sizes, what
        analysis = sizes.analysis
        made = analysis.copies.keys() | {name for item in analysis.hoists for name in item.made}
        weights = {n: w for n, w in analysis.graph.weights.items() if n not in made}
        self._moving = {n: w for n, w in weights.items() if sizes.touched(n)}
        whole = {
            "params": analysis.parameters,
            "size": analysis.loaded.size,
            "weights": sum(_bytes(w, prod(w.shape)) for w in weights.values()),
        }
        self._fixed = whole[what] - sum(self._of(w, prod(w.shape)) for w in self._moving.values())

    def rows(self, kept: Counts) -> Costs:
        """Elements or bytes [cuts, 1]."""
        shape = self._sizes.at(kept)
        parts = (self._of(w, prod(shape(name))) for name, w in self._moving.items())
        return np.asarray(sum(parts, start=np.full(len(kept), float(self._fixed))))[:, None]

    def _of(self, weight: Weight, elements: Any) -> Any:
        return elements if self._what == "params" else _bytes(weight, elements)


def _bytes(weight: Weight, elements: Any) -> Any:
    """Bytes of so many elements; 0 for text."""
    if weight.dtype.kind == "O":
        return 0
    return elements * PACKED_BITS.get(weight.onnx_type, 8 * weight.dtype.itemsize) / 8


class Peak:
    """Bytes of the weights and of the activations alive at once, one row per moment; see :class:`Memory`."""

    def __init__(self, sizes: Sizes) -> None:
        self._weights, self._memory = Stored(sizes, "weights"), Memory(sizes)

    def rows(self, kept: Counts) -> Costs:
        """Bytes [cuts, moments]."""
        return np.asarray(self._weights.rows(kept) + self._memory.alive(kept))

    def dearest(self, kept: Counts) -> tuple[str, float]:
        """The node at which most is alive for counts [groups], and which share of that the activations are."""
        alive = self._memory.alive(kept[None])[0]
        most = int(np.argmax(alive))
        whole = alive[most] + float(self._weights.rows(kept[None])[0, 0])
        return self._memory.rows[most].label, float(alive[most]) / max(whole, 1.0)


def costs_of(analysis: Analysis, sizes: Sizes, kind: str) -> Cost:
    """The countable cost of that kind: ``macs``, ``params``, ``size`` or ``peak-memory``."""
    if kind == "macs":
        return Macs(sizes)
    return Peak(sizes) if kind == "peak-memory" else Stored(sizes, kind)


def total(cost_of: Cost, kept: Counts) -> Costs:
    """The cost [cuts] of the model: its dearest row."""
    return np.asarray(cost_of.rows(kept).max(axis=1))
