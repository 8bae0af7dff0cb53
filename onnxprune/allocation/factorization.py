"""Costs of groups where layers may be factorized as well, as further columns of counts, or where nodes are absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.costs import Cost, Costs, Counts, Peak, Sizes, WeightCost
from onnxprune.allocation.knapsack import Choices
from onnxprune.allocation.latency_model import Latency
from onnxprune.graph import cost
from onnxprune.graph.view import Node

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Part:
    """A layer that may be factorized.

    Attributes:
        nodes: the nodes that read its weight.
        weight: name of its weight.
        losses: [levels], by rising cost; the last one is 0, that of the layer unchanged.
        macs, params: shares [levels] of its cost unchanged.
        times: shares [levels] of its time, where that was measured.
    """

    nodes: tuple[Node, ...]
    weight: str
    losses: Array
    macs: Array
    params: Array
    times: Array | None = None

    def shares(self, kind: str) -> Array:
        """Return the shares [levels] of a cost of that kind that remain."""
        if kind == "latency" and self.times is not None:
            return self.times
        return self.macs if kind == "macs" else self.params


class FactorizedCost:
    """A cost of groups and layers together: counts [cuts, groups + parts], the last columns number levels of parts.

    A pruned layer is assumed to keep its share at the level: the cost of its factors scales with its channels as the
    cost of the layer does.

    Args:
        whole: cost of the groups alone.
        kind: ``macs``, ``params`` or ``size``; ``latency`` where parts know times.
    """

    def __init__(self, original: Cost, kind: str, sizes: Sizes, parts: Sequence[Part]) -> None:
        self._original, self._kind, self._sizes, self._parts = original, kind, sizes, parts
        self._shares = [p.shares(kind) for p in parts]

    def rows(self, remaining: Counts) -> Costs:
        """Return costs [cuts, rows]."""
        groups = remaining.shape[1] - len(self._parts)
        counts = remaining[:, :groups]
        shape = self._sizes.at(counts)
        saved = np.zeros(len(remaining))
        for column, (part, shares) in enumerate(zip(self._parts, self._shares, strict=True), start=groups):
            saved += (1.0 - shares[remaining[:, column]]) * self._cost(part, shape, len(remaining))
        return np.asarray(self._original.rows(counts) - saved[:, None])

    def _cost(self, part: Part, shape: cost.ShapeOf, cuts: int) -> Array:
        if isinstance(self._original, Latency):
            return self._original.of(part.nodes, shape, cuts)
        if self._kind == "macs":
            return np.asarray(sum(cost.macs(node, shape) for node in part.nodes), dtype=np.float64)
        elements = np.asarray(np.prod(np.broadcast_arrays(*shape(part.weight)), axis=0), dtype=np.float64)
        assert isinstance(self._original, WeightCost)
        return np.asarray(self._original.of(part.weight, elements), dtype=np.float64)


class ReducedCost:
    """A cost of groups in a model without some nodes, such as those of residual branches.

    Args:
        original: cost with all nodes.
        kind: its kind.
        sizes: of all tensors as functions of counts.
        nodes: the nodes that the model lacks.
        weights: names of the weights that only these nodes read.
    """

    def __init__(self, original: Cost, kind: str, sizes: Sizes, nodes: Sequence[Node], weights: Sequence[str]) -> None:
        self._original, self._kind, self._sizes = original, kind, sizes
        self._nodes, self._weights = nodes, weights
        self._layers = [node for node in nodes if cost.is_layer(node, sizes.analysis.graph)]
        moments = original.moments if isinstance(original, Peak) else ()
        absent = {node.index for node in nodes}
        self._absent = np.array([moment.index in absent for moment in moments], dtype=bool)

    def rows(self, counts: Counts) -> Costs:
        """Return costs [cuts, rows] for counts [cuts, groups] of kept steps."""
        result = self._original.rows(counts) - self.saved(counts)[:, None]
        if self._absent.any():
            result[:, self._absent] = 0.0
        return np.asarray(result)

    def saved(self, counts: Counts) -> Array:
        """Return the cost [cuts] of the nodes; of a peak memory that of their weights."""
        shape, cuts = self._sizes.at(counts), len(counts)
        if isinstance(self._original, Latency):
            return np.broadcast_to(self._original.of(self._nodes, shape, cuts), cuts)
        if self._kind == "macs":
            total = sum((cost.macs(node, shape) for node in self._layers), start=np.zeros(cuts))
        else:
            assert isinstance(self._original, (WeightCost, Peak))
            parts = (self._original.of(name, prod(shape(name))) for name in self._weights)
            total = sum(parts, start=np.zeros(cuts))
        return np.asarray(total, dtype=np.float64)


def add_parts(choices: Choices, parts: Sequence[Part], rate: float) -> Choices:
    """Return choices of groups and layers; ``rate`` is the weight of a group's loss against a layer's."""
    levels = [np.arange(p.losses.size, dtype=np.int64) for p in parts]
    return Choices([*choices.options, *levels], [*(rate * x for x in choices.losses), *(p.losses for p in parts)])


def exclude_parts(choices: Choices, parts: Sequence[Part]) -> Choices:
    """Return choices of layers where every group keeps its largest count."""
    only = Choices([k[-1:] for k in choices.options], [x[-1:] for x in choices.losses])
    return add_parts(only, parts, 1.0)
