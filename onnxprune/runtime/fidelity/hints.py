"""Hints of the graph about a model's outputs: the axis of their channels, and the operators at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.graph import cost
from onnxprune.graph.caches import find_caches
from onnxprune.graph.view import Graph
from onnxprune.labels.label import Label
from onnxprune.operators.registry import rule_of
from onnxprune.runtime.fidelity.kinds import Hint

# Operators that give lists of a length that depends on values, in any domain (TensorRT's NMS plugins among them).
_SELECTING = ("NonMaxSuppression", "NonZero", "TopK", "NMS")
_DEPTH = 24
Mask = NDArray[np.bool_]


def hints_of(analysis: Analysis) -> dict[str, Hint]:
    """Return hints from the graph on every output, by its name."""
    names = [output.name for output in analysis.graph.proto.graph.output]
    pasts = {cache.present: cache.past for cache in find_caches(analysis.graph)}
    of_layers = _atoms_of_layers(analysis)
    return {name: _hint(name, analysis, of_layers, pasts.get(name, "")) for name in names}


def _hint(name: str, analysis: Analysis, of_layers: Mask, past: str) -> Hint:
    ends, listed = _ends(name, analysis.graph)
    return Hint(_channel_axis(analysis.table.get(name), of_layers), ends, listed, past)


def _atoms_of_layers(analysis: Analysis) -> Mask:
    """Return the mask over atoms of those on weights that layers multiply with; others lie on constants alone."""
    mask = np.zeros(analysis.units.component.size, dtype=bool)
    for node in analysis.graph.steps:
        for position in rule_of(node).weights:
            for label in analysis.table.get(node.inputs[position]) if position < len(node.inputs) else ():
                mask[label.ids[label.ids >= 0]] = True
    return mask


def _channel_axis(labels: Sequence[Label], of_layers: Mask) -> int | None:
    """Return the axis along which every position is another channel; None where there is none, or several.

    Anchors of several levels are channels of several layers along the axis of anchors, but of a few only. Where the
    places of anchors are a constant, its positions differ along that axis, and no layer has made them.

    Args:
        labels: of the output.
        of_layers: mask over atoms [atoms] of those that a layer's weight has.
    """
    shares, layered = dict[int, float](), dict[int, float]()
    for label in labels:
        for axis in label.axes:
            lines: Any = np.moveaxis(label.ids, axis, 0).reshape(label.ids.shape[axis], -1)
            atoms = np.unique(lines[:, 0])
            shares[axis] = max(shares.get(axis, 0.0), len(atoms) / len(lines))
            layered[axis] = max(layered.get(axis, 0.0), of_layers[atoms[atoms >= 0]].sum() / len(lines))
    # The first axis holds samples: it is labelled as well where a weight, such as a first state, has one row for each.
    ranked = layered if max(layered.values(), default=0.0) >= 0.4 else shares
    best = max(ranked, key=lambda axis: (ranked[axis], shares[axis], axis > 0), default=None)
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
