"""How plausible inputs are that were made up, told by what the original makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.contractions import Form, Scale
from onnxprune.graph.view import Graph, Node
from onnxprune.passes.restate import normalisations
from onnxprune.recover.aims import Aim, find_aims, outputs
from onnxprune.recover.plausible import divergence, interest
from onnxprune.rewrite.after import After
from onnxprune.runtime.sessions import Feed

Array = NDArray[Any]

# Rows of a layer to take of all calls, bytes of activations to look at in one call, and outputs below which a layer
# cannot tell much.
_ROWS, _HEAVY, _FEW = 4096, 256 << 20, 4


class Gauge:
    """Judges inputs by what the original does with them.

    Attributes:
        names: the tensors to look at.
    """

    def __init__(self, analysis: Analysis, layers: Mapping[str, Form], norms: Mapping[str, Node]) -> None:
        self._analysis, self._layers, self._norms = analysis, layers, norms
        self.names = list(norms or layers)

    @classmethod
    def of(cls, analysis: Analysis) -> Gauge:
        """What there is to look at in a model."""
        graph = analysis.graph
        norms = {node.inputs[0]: node for node in normalisations(graph)}
        made = {o for node in graph.nodes for o in node.outputs if o} - graph.inner
        whole = After(analysis.table, np.zeros(analysis.units.component.size, dtype=bool))
        aims = [aim for level in find_aims(graph, made, whole.shape, joint=False).levels for aim in level]
        layers = {aim.node.outputs[0]: aim.form for aim in aims if _outputs(graph, aim) >= _FEW}
        return cls(analysis, layers, norms)

    def at_once(self, samples: int) -> int:
        """How many samples to look at in one call."""
        shapes = [self._analysis.facts.shape(name) for name in self.names]
        size = 4 * sum(int(np.prod([n or 1 for n in shape[1:]])) for shape in shapes if shape)
        return int(np.clip(_HEAVY // max(size, 1), 1, samples))

    def read(self, calls: Iterator[Feed], number: int) -> float:
        """How plausible the inputs are that gave these values in that number of calls: higher is better."""
        values: dict[str, list[Array]] = {name: [] for name in self.names}
        for call in calls:
            for name, value in call.items():
                values[name].append(self._rows(name, value, max(1, _ROWS // number)))
        scores = [self._score(name, np.concatenate(rows)) for name, rows in values.items()]
        return float(np.mean(scores)) if np.isfinite(scores).all() else -np.inf

    def _rows(self, name: str, value: Array, most: int) -> Array:
        """Some rows [rows, channels] of a tensor's value."""
        if name in self._norms:
            rows = np.moveaxis(value, 1, -1).reshape(-1, value.shape[1])
        else:
            parts = self._layers[name].rows(value)
            rows = parts.transpose(1, 0, 2).reshape(parts.shape[1], -1)
        # A stride that is odd does not fall into step with positions.
        return rows[:: max(1, len(rows) // most) | 1]

    def _score(self, name: str, rows: Array) -> float:
        if not np.isfinite(rows).all():
            return -np.inf
        if name not in self._norms:
            return interest(rows)
        weights = self._analysis.graph.weights
        mean, variance = (weights[n].read().astype(np.float64) for n in self._norms[name].inputs[3:5])
        wide = rows.astype(np.float64)
        return -divergence(wide.mean(axis=0), wide.var(axis=0), mean, variance)


def _outputs(graph: Graph, aim: Aim) -> int:
    """Outputs of a layer; of a scale per channel none, which depend on each other as its inputs do."""
    if isinstance(aim.form, Scale):
        return 0
    return outputs(aim.form, aim.weight.shape(graph.weights))
