"""Activations that are alive at once, moment by moment, as a function of how many steps every group keeps."""

from __future__ import annotations

from math import prod

import numpy as np
from scipy.sparse import csr_matrix

from onnxprune.budget.sizes import Counts, Sizes
from onnxprune.graph.cost import known
from onnxprune.graph.view import Graph, reads
from onnxprune.model.elements import DTYPES
from onnxprune.operators.registry import Move, rule_of

# What a runtime does not copy.
_VIEWS = (Move.SAME, Move.SHAPE)
_FLOAT = 1


class Memory:
    """Bytes of activations alive while each node runs, at the first probe's shapes, nodes in the order of the graph.

    A tensor is alive from the node that makes it to the last that reads it, an input from the start, an output to the
    end; what only changes a shape shares its input's memory. What a runtime saves besides by working in place, or
    spends on scratch space, is its own affair and not counted. Tensors whose size is not known count as nothing.

    Attributes:
        moments: the nodes in order. rows: those that the rows of ``alive`` stand for.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        graph = sizes.analysis.graph
        self.moments = graph.steps
        spans = _spans(graph)
        shape = sizes.analysis.facts.shape
        names = [n for n in spans if known(shape(n))]
        moving = [n for n in names if sizes.touched(n)]
        fixed = [n for n in names if not sizes.touched(n)]
        self._each = {name: self._element(name) for name in names}
        still = _during(spans, fixed, len(self.moments)) @ np.array([self._bytes(shape(n), n) for n in fixed])
        during = _during(spans, moving, len(self.moments))
        # Moments with the same tensors alive, and no more besides, are one row.
        rows = _distinct(during, still)
        self._still, self._during, self._moving = still[rows], during[rows], moving
        self.rows = [self.moments[i] for i in rows]

    def alive(self, kept: Counts) -> np.ndarray:
        """Bytes [cuts, distinct moments] for counts [cuts, groups] of kept steps."""
        shape = self._sizes.at(kept)
        each = [np.broadcast_to(self._bytes(shape(n), n), len(kept)) for n in self._moving]
        moving = np.stack(each, axis=0) if each else np.zeros((0, len(kept)))
        return np.asarray((self._during @ moving).T + self._still)

    def _bytes(self, shape: tuple[int, ...], name: str) -> float:
        return prod(shape) * self._each[name]

    def _element(self, name: str) -> float:
        number = self._sizes.analysis.facts.probes[0].dtypes.get(name, _FLOAT)
        return float(DTYPES.get(number, DTYPES[_FLOAT]).itemsize)


def _spans(graph: Graph) -> dict[str, tuple[int, int]]:
    """First and last moment of every tensor that holds memory of its own."""
    home = {name: name for name in graph.inputs}
    spans = {name: [0, 0] for name in graph.inputs}
    for moment, node in enumerate(graph.steps):
        for name in reads(node):
            if name in home:
                spans[home[name]][1] = moment
        for position, name in enumerate(node.outputs):
            if not name or name in graph.weights:
                continue
            view = position == 0 and rule_of(node).moves in _VIEWS and node.inputs[0] in home
            home[name] = home[node.inputs[0]] if view else name
            if not view:
                spans[name] = [moment, moment]
    for name in graph.outputs:
        if name in home:
            spans[home[name]][1] = len(graph.steps) - 1
    return {name: (first, last) for name, (first, last) in spans.items()}


def _during(spans: dict[str, tuple[int, int]], names: list[str], moments: int) -> csr_matrix:
    """[moments, names]: 1 while the tensor is alive."""
    rows = [np.arange(spans[n][0], spans[n][1] + 1) for n in names]
    columns = np.repeat(np.arange(len(names)), [r.size for r in rows])
    at = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return csr_matrix((np.ones(at.size), (at, columns)), shape=(moments, len(names)))


def _distinct(during: csr_matrix, still: np.ndarray) -> np.ndarray:
    """One moment for every set of moving tensors: that with most memory besides."""
    keys = [row.indices.tobytes() for row in during]
    order = np.argsort(-still, kind="stable")
    best: dict[bytes, int] = {}
    for i in order.tolist():
        best.setdefault(keys[i], i)
    return np.array(sorted(best.values()), dtype=np.int64)
