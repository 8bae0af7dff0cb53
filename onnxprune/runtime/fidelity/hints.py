"""Hints of the graph about a model's outputs: the axis of their channels, and the operators at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxprune.channels.analysis import Analysis
from onnxprune.graph import cost
from onnxprune.graph.caches import find_caches
from onnxprune.graph.view import Graph
from onnxprune.labels.label import Label
from onnxprune.runtime.fidelity.kinds import Hint

# Operators that give lists of a length that depends on values, in any domain (TensorRT's NMS plugins among them).
_SELECTING = ("NonMaxSuppression", "NonZero", "TopK", "NMS")
_DEPTH = 24


def hints_of(analysis: Analysis) -> dict[str, Hint]:
    """Return hints from the graph on every output, by its name."""
    names = [output.name for output in analysis.graph.proto.graph.output]
    pasts = {cache.present: cache.past for cache in find_caches(analysis.graph)}
    return {name: _hint(name, analysis, pasts.get(name, "")) for name in names}


def _hint(name: str, analysis: Analysis, past: str) -> Hint:
    ends, listed = _ends(name, analysis.graph)
    return Hint(_channel_axis(analysis.table.get(name)), ends, listed, past)


def _channel_axis(labels: Sequence[Label]) -> int | None:
    """Return the axis along which every position is another channel; None where there is none, or several.

    Anchors of several levels are channels of several layers along the axis of anchors, but of a few only.
    """
    shares: dict[int, float] = {}
    for label in labels:
        for axis in label.axes:
            lines: Any = np.moveaxis(label.ids, axis, 0).reshape(label.ids.shape[axis], -1)
            shares[axis] = max(shares.get(axis, 0.0), len(np.unique(lines[:, 0])) / len(lines))
    # The first axis holds samples: it is labelled as well where a weight, such as a first state, has one row for each.
    best = max(shares, key=lambda axis: (shares[axis], axis > 0), default=None)
    return best if best is not None and shares[best] >= 0.4 else None


def _ends(name: str, graph: Graph) -> tuple[frozenset[str], bool]:
    """Return the types of operators behind an output, up to the layers that made it, and whether rows are selected."""
    ends, queue, listed, visited = set[str](), [(name, 0, True)], False, set[str]()
    while queue:
        tensor, depth, near = queue.pop(0)
        node = graph.producer.get(tensor)
        if node is None or tensor in visited or depth > _DEPTH:
            continue
        visited.add(tensor)
        listed |= any(word in node.op for word in _SELECTING)
        near = near and not cost.multiplies(node)
        if near:
            ends.add(node.op)
        queue.extend((source, depth + 1, near) for source in node.inputs if source)
    return frozenset(ends), listed
