"""Which activations a repair can compare between the original and the cut model, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.model import markers
from onnxprune.model.exposing import hidden
from onnxprune.passes.state import State
from onnxprune.rewrite.after import After
from onnxprune.runtime.sessions import Array

Get = Callable[[str, int], Array]


def seen(state: State) -> Iterator[str]:
    """Activations of the original whose values can be had, and which the model that was cut has too."""
    full, graph = state.original.graph, state.analyzed().graph
    unseen = hidden(full.proto)
    for node in full.nodes:
        # Of layers in Loops that were taken apart nobody knows the shapes.
        if not (state.factorized and markers.repeating(full.around[node.index]) is not None):
            yield from (o for o in node.outputs if o in graph.producer and o not in unseen)


def inside(analysis: Analysis) -> dict[str, tuple[int, int]]:
    """Element types and ranks of what lies inside of bodies."""
    probe = analysis.facts.probes[0]
    return {n: (probe.dtypes.get(n, 1), len(probe.shapes.get(n) or ())) for n in analysis.graph.inner}


def can_follow(analysis: Analysis, after: After, name: str) -> bool:
    """Whether survivors stand at the same positions at any batch size: not where heads and samples share an axis."""
    for axis, index in after.steps(name):
        axes = {axis} if index.ndim == 1 else {axis, *(a for a, n in enumerate(index.shape) if n > 1)}
        if any(analysis.facts.varies(name, a) for a in axes):
            return False
    return True


def survivors(full: Get, after: After, name: str, batch: int) -> Array:
    """A value of the original without what the cut removed."""
    value = full(name, batch)
    for axis, index in after.steps(name):
        value = value.take(index, axis=axis) if index.ndim == 1 else np.take_along_axis(value, index, axis=axis)
    return value
