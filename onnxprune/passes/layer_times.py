"""How long one layer takes on its own, as it is and taken apart; and how long whole models do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from onnxprune.analysis import Analysis
from onnxprune.errors import ModelError
from onnxprune.factors.layer import Layer, ShapeOf
from onnxprune.factors.rewrite import Factorized, replace_layers
from onnxprune.graph.view import Graph
from onnxprune.model.save import assemble
from onnxprune.model.weights import Weight
from onnxprune.passes.trial import Trial, synthetic_feeds
from onnxprune.pipeline import Context, ModelParts
from onnxprune.report.facts import Latency
from onnxprune.runtime.device import Device
from onnxprune.runtime.latency import in_turn, latency
from onnxprune.runtime.segments import part_model

# Runs of either form, and seconds they may take together.
_RUNS, _SECONDS = 15, 0.4
# Runs of whole models.
_WHOLE = 30


def model_latency(context: Context, analysis: Analysis, before: ModelParts, after: ModelParts) -> Latency | None:
    """Milliseconds of two whole models on one input, medians; None where they are too large."""
    with Trial.of(context.analysis) as trial:
        if trial.large:
            return None
        one, _ = trial.write(*before, "before")
        other, _ = trial.write(*after, "after")
        feeds, where = synthetic_feeds(context, analysis)[:1], context.device
        return latency(one, other, feeds, runs=_WHOLE, threads=where.threads, providers=where.providers)


def layer_latency(
    graph: Graph, weights: Mapping[str, Weight], shape: ShapeOf, item: Factorized, seed: int, where: Device
) -> Latency | None:
    """Milliseconds of the layer and of its factors at the probe sizes, lower quartiles; None where it cannot run."""
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
        times = in_turn([before, changed], [{fed[0]: value}], where, runs=_RUNS, budget_s=_SECONDS)
    except ModelError:  # no kernel for this type: then nothing can be said
        return None
    # A layer's run is short: what other programs on the machine add to some of the runs is left out.
    (one, one_more), (other, other_more) = (np.percentile(t, [25, 75]).tolist() for t in times)
    return Latency(one, other, one_more - one, other_more - other, len(times[0]), where.threads)
