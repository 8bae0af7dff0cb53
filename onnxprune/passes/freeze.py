"""Freeze what stands in the way of a cut: the channels of a node that has no form with the new sizes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.labels.atoms import Barrier
from onnxprune.labels.label import Ids
from onnxprune.rewrite.cut import CannotRewrite


def frozen_at(analysis: Analysis, stop: CannotRewrite, removed: NDArray[np.bool_]) -> Analysis:
    """The analysis in which the channels of a node stay that cannot be rewritten.

    Args:
        stop: was raised for the node. removed: mask over atoms of what was to be removed.
    """
    why = Barrier("unsupported-form", stop.node.label, stop.node.kind, stop.detail)
    freezes: list[tuple[Ids, Barrier]] = []
    for name in (*stop.node.inputs, *stop.node.outputs):
        for label in analysis.table.get(name) if name else ():
            if removed[label.ids].any():
                component = analysis.units.component
                ids = np.flatnonzero(np.isin(component, np.unique(component[label.ids])))
                freezes.append((ids, why))
    if not freezes:  # the node only sees sizes: whatever they were taken from has to stay
        ids = _sized(analysis, stop, removed)
        freezes.append((ids if ids.size else np.flatnonzero(removed), why))
    return analysis.with_frozen(freezes)


def _sized(analysis: Analysis, stop: CannotRewrite, removed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Removed atoms on tensors whose size reaches the node by computation."""
    queue, seen, found = list(stop.node.inputs), set(stop.node.inputs), [np.zeros(0, np.int64)]
    while queue:
        producer = analysis.graph.producer.get(queue.pop())
        if producer is None:
            continue
        if producer.op == "Shape":
            labels = analysis.table.get(producer.inputs[0])
            found.extend(x.ids[removed[x.ids]] for x in labels)
            continue
        fresh = [n for n in producer.inputs if n and n not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return np.unique(np.concatenate([f.ravel() for f in found]))
