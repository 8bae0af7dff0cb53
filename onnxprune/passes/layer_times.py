"""How long one layer takes on its own, as it is and taken apart; and how long whole models do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune.errors import ModelError
from onnxprune.factors.layer import Layer, ShapeOf
from onnxprune.factors.rewrite import Factorized, replace_layers
from onnxprune.graph.view import Graph
from onnxprune.model.save import assemble
from onnxprune.model.weights import Weight
from onnxprune.passes.prepared import Model
from onnxprune.passes.state import State
from onnxprune.passes.trial import Trial, synthetic_feeds
from onnxprune.report.facts import Latency
from onnxprune.runtime.device import Device
from onnxprune.runtime.latency import in_turn
from onnxprune.runtime.segments import part_model
from onnxprune.runtime.sessions import Feed

# Runs of either form, and seconds they may take together.
_RUNS, _SECONDS = 15, 0.4


def model_latency(state: State, before: Model, after: Model) -> Latency | None:
    """Milliseconds of the fastest run of two whole models on one input; None where they are too large."""
    with Trial.of(state.original) as trial:
        if trial.large:
            return None
        one, _ = trial.write(*before, "before")
        other, _ = trial.write(*after, "after")
        return _fastest(one, other, synthetic_feeds(state, state.analyzed())[:1], state.device)


def layer_latency(
    graph: Graph, weights: Mapping[str, Weight], shape: ShapeOf, item: Factorized, seed: int, where: Device
) -> Latency | None:
    """Milliseconds of the fastest run of the layer and of its factors, probe sizes; None where it cannot run alone."""
    layer: Layer = item.layer
    node = layer.uses[0].node
    fed = [n for n in dict.fromkeys(node.inputs) if n and n not in weights]
    sizes = shape(fed[0]) if len(fed) == 1 else None
    if sizes is None or None in sizes or layer.described.geometry.looked_up:
        return None
    kind = weights[layer.weight].dtype
    value = np.asarray(np.random.default_rng(seed).standard_normal(sizes)).astype(kind)
    outputs = [o for o in node.outputs if o]
    before = part_model(graph, weights, [node], {fed[0]: value}, outputs)
    small = onnx.load_from_string(before)
    own = {n: w for n, w in weights.items() if n in node.inputs}
    after = Graph.of(small, own)
    replace_layers(after, own, [item])
    try:
        changed = bytes(assemble(after.proto, own).SerializeToString())
        return _fastest(before, changed, [{fed[0]: value}], where, runs=_RUNS, budget_s=_SECONDS)
    except ModelError:  # no kernel for this type: then nothing can be said
        return None


def _fastest(
    before: Path | bytes, after: Path | bytes, feeds: Sequence[Feed], where: Device, **settings: Any
) -> Latency:
    """The fastest run of either: other programs on the machine only ever add time, and a layer's is short."""
    times = in_turn([before, after], feeds, where, **settings)
    spreads = [float(np.subtract(*np.percentile(t, [75, 25]))) for t in times]
    return Latency(min(times[0]), min(times[1]), spreads[0], spreads[1], len(times[0]), where.threads)
