"""Range of the data, against the range that the first BatchNormalizations of a model were trained on."""

from __future__ import annotations

import numpy as np

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import OnnxpruneError
from onnxprune.graph.view import Graph, Node
from onnxprune.io.write import assemble
from onnxprune.passes.recalibrated import normalisations
from onnxprune.runtime.capture import with_outputs
from onnxprune.runtime.sessions import Feed, eps, open_session, run

# Factor between the scale of activations and that of training from which on the data are doubted. Preparations that
# are all common (0..1, or mean 0 and variance 1) differ by less; 0..255 in place of 0..1 by far more.
_FACTOR = 6.0


def range_doubts(analysis: Analysis, feed: Feed) -> list[str]:
    """Return a warning where data have another scale than the model was trained on, with both ranges.

    Args:
        analysis: of the model.
        feed: one call.
    """
    names = [name for name, array in feed.items() if array.ndim >= 2 and (eps(array.dtype) or array.dtype.kind in "iu")]
    nodes = _first(analysis.graph)
    if len(names) != 1 or not nodes:
        return []
    low, high = float(feed[names[0]].min()), float(feed[names[0]].max())
    if not np.isfinite([low, high]).all() or low == high:
        return []
    try:
        model = with_outputs(assemble(analysis.graph.proto, analysis.graph.weights), [n.inputs[0] for n in nodes])
        values = run(open_session(model.SerializeToString()), feed)
    except OnnxpruneError:  # nothing is lost but the advice
        return []
    factors = [_factor(analysis.graph, node, values[node.inputs[0]]) for node in nodes]
    factor = float(np.median(factors))
    if not factor or 1 / _FACTOR <= factor <= _FACTOR:
        return []
    word, times = ("small", factor) if factor > 1 else ("large", 1 / factor)
    return [
        f"the data of {names[0]!r} range from {low:.4g} to {high:.4g}, but the first BatchNormalization "
        f"({nodes[0].label}) was trained on inputs {times:.0f} times as {word}: about {low / factor:.2g} to "
        f"{high / factor:.2g}; prepare the data as in training"
    ]


def _first(graph: Graph) -> list[Node]:
    """Return the normalisations that no other one stands in front of."""
    by_output = {node.outputs[0]: node for node in normalisations(graph)}
    behind: set[str] = set()
    first = []
    for node in graph.steps:
        inside = any(name in behind for name in node.inputs if name)
        if node.outputs and node.outputs[0] in by_output and not inside:
            first.append(node)
        if inside or (node.outputs and node.outputs[0] in by_output):
            behind.update(name for name in node.outputs if name)
    return first[:4]


def _factor(graph: Graph, node: Node, value: np.ndarray) -> float:
    """Return the size of the activations over the size that training saw, the median over channels."""
    mean, variance = (graph.weights[name].read().astype(np.float64) for name in node.inputs[3:5])
    rows = np.moveaxis(value, 1, 0).reshape(value.shape[1], -1).astype(np.float64)
    measured_square, trained = np.square(rows).mean(1), variance + np.square(mean)
    significant = trained > 1e-6 * float(trained.max(initial=0.0))
    return float(np.median(np.sqrt(measured_square[significant] / trained[significant]))) if significant.any() else 0.0
