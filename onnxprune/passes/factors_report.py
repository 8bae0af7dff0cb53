"""What a factorization did, as facts: layers, sums, warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from onnxprune.decompose.cost import elements
from onnxprune.graph.cost import is_layer, layer_weights, macs
from onnxprune.graph.infer import probe_at
from onnxprune.graph.view import Graph
from onnxprune.passes.factor_work import Done, Work
from onnxprune.pipeline import Context, Model
from onnxprune.propagate import infer_by_rule
from onnxprune.report.facts import Exactness, Fact, Factorization, FactorizedLayer, Remark, Sizes


def describe_factors(
    context: Context, model: Model, work: Work, done: Sequence[Done], left: Mapping[str, str], product: Exactness
) -> Iterator[Fact]:
    """Facts about a factorization.

    Args:
        context: the run. model: factorized. work: what was known of its layers before.
        done, left: layers that were factorized, and why others were not. product: what the check of the products said.
    """
    layers = list(_layers(work, done, left))
    known = {layer.name for layer in layers}
    layers += [FactorizedLayer(name, "", reason=why) for name, why in left.items() if name not in known]
    yield Factorization(layers, product)
    yield from (Remark(f"{d.opened.layer.name}: {d.note}") for d in done if d.note)
    bad = [name for name, why in left.items() if "NaN" in why]
    if bad:
        yield Remark(f"left alone, since weights hold NaN or infinity: {', '.join(bad[:4])}")
    graph = Graph.of(*model.parts)
    shape = probe_at(graph, model.analysis.facts.probes[0].inputs, infer_by_rule).shapes.get
    yield Sizes(
        params_before=context.analysis.parameters,
        params_after=model.num_parameters,
        macs_before=sum(x.macs_before for x in context.analysis.layers),
        macs_after=sum(macs(node, shape) for node in graph.steps if is_layer(node, graph)),
    )


def _layers(work: Work, done: Sequence[Done], left: Mapping[str, str]) -> Iterator[FactorizedLayer]:
    """Layers in the order of the graph, then those that have no node of their own."""
    by_name = {d.opened.layer.name: _layer(d) for d in done}
    graph = work.model.graph
    for node in graph.steps:
        name = node.label
        if name in by_name:
            yield by_name.pop(name)
        elif name in left and is_layer(node, graph):
            params = sum(int(np.prod(graph.weights[w].shape)) for w in layer_weights(node, graph))
            cost = macs(node, work.shape)
            sizes = {"params_before": params, "params_after": params, "macs_before": cost, "macs_after": cost}
            yield FactorizedLayer(name, node.op, reason=left[name], **sizes)
    yield from by_name.values()


def _layer(done: Done) -> FactorizedLayer:
    layer, candidate = done.opened.layer, done.candidate
    stages = [f.stage for f in done.item.factors]
    whole = [layer.shape.whole()]
    return FactorizedLayer(
        name=layer.name,
        op=layer.uses[0].node.op,
        method=candidate.method,
        ranks=list(candidate.ranks),
        error=done.error,
        params_before=elements(whole),
        params_after=elements(stages),
        macs_before=layer.macs(whole),
        macs_after=layer.macs(stages),
        before_ms=None if done.timed is None else done.timed.before_ms,
        after_ms=None if done.timed is None else done.timed.after_ms,
        note=done.note,
    )
