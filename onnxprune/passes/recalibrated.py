"""Recalibrated BatchNormalizations: statistics as they would be, had training seen the inputs of a recovery."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels.survivors import Survivors
from onnxprune.graph.view import Graph, GraphEditor, Node
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.operators.registry import rule_of
from onnxprune.runtime.segments import Segments, Store
from onnxprune.runtime.sessions import Feed

Real = NDArray[np.float64]
# Share of the largest variance below which a channel is taken not to vary.
_STILL = 1e-8


def normalisations(graph: Graph) -> list[Node]:
    """BatchNormalizations of activations whose statistics are weights of their own, outside of bodies."""
    activations = {o for node in graph.nodes for o in node.outputs if o} - graph.inner
    return [
        node
        for node in graph.nodes
        if (statistics := rule_of(node).statistics)
        and max(statistics) < len(node.inputs)
        and node.inputs[0] in activations
        if not (graph.has_bodies and graph.around[node.index])
        if all(
            node.inputs[i] in graph.weights and len(graph.consumers.get(node.inputs[i], ())) == 1 for i in statistics
        )
    ]


class Recalibrated:
    """A pair of models whose BatchNormalizations have the statistics that some inputs have in the original.

    Behind such a normalisation a channel has the mean and variance that training gave it, for all inputs: a layer is
    fitted to data of the scale that it will meet. The fit stays right under the statistics that were trained,
    since a weight in front of a normalisation and the scale behind it mean the same under both.

    Args:
        original: its graph.
        after: survivors of the removal.
        graph, weights: of the cut model; changed until ``undo``.
        feeds: the inputs.
        store: room for activations.

    Attributes:
        original: weights of the original with other statistics.
    """

    def __init__(
        self,
        original: Graph,
        after: Survivors,
        graph: Graph,
        weights: dict[str, Weight],
        feeds: Sequence[Feed],
        store: Store,
    ) -> None:
        self.original = dict(original.weights)
        self._weights, self._before = weights, dict[str, Weight]()
        by_output = {node.outputs[0]: node for node in normalisations(graph)}
        nodes = [node for node in normalisations(original) if node.outputs[0] in by_output]
        editor = GraphEditor(graph, weights)
        run = Segments(original, self.original, [[node.inputs[0]] for node in nodes], store)
        run.feed(feeds)
        for piece, node in enumerate(nodes):
            for _ in run.run(piece):
                pass
            mean, variance = _moments(store, node.inputs[0], run.batches)
            run.drop(piece)
            positions = rule_of(node).statistics
            trained: Real = self.original[node.inputs[positions[1]]].read().astype(np.float64)
            variance = np.where(variance > _STILL * float(variance.max(initial=0.0)), variance, trained)
            twin = by_output[node.outputs[0]]
            for position, values in zip(positions, (mean, variance), strict=True):
                name, cut = node.inputs[position], twin.inputs[position]
                self.original[name] = ArrayWeight(name, values.astype(self.original[name].dtype))
                for _axis, index in after.steps(name):
                    values = values.take(index)
                self._before[cut] = weights[cut]
                editor.set_constant(ArrayWeight(cut, values.astype(weights[cut].dtype)))

    def undo(self) -> None:
        """Give the cut model its statistics back."""
        self._weights.update(self._before)


def _moments(store: Store, name: str, batches: int) -> tuple[Real, Real]:
    """Mean and variance of every channel on axis 1."""
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for batch in range(batches):
        value = np.moveaxis(np.asarray(store.get(name, batch)), 1, 0)
        rows = value.reshape(value.shape[0], -1).astype(np.float64)
        count, total, squares = count + rows.shape[1], total + rows.sum(axis=1), squares + np.square(rows).sum(axis=1)
    mean = total / count
    return mean, np.maximum(squares / count - np.square(mean), 0.0)
