"""What a factorization did, for the report: layers, sums, warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune.decompose.cost import elements
from onnxprune.graph.cost import is_layer, layer_weights, macs
from onnxprune.graph.infer import probe_at
from onnxprune.graph.view import Graph
from onnxprune.model.weights import Weight
from onnxprune.passes.factor_work import Done, Work
from onnxprune.passes.state import State
from onnxprune.propagate import infer_by_rule
from onnxprune.report.facts import FactorizedLayer


def describe(state: State, work: Work, done: Sequence[Done], left: Mapping[str, str]) -> None:
    """Fill the report."""
    report = state.report
    by_name = {d.opened.layer.name: _layer(d) for d in done}
    for node in work.model.graph.steps:
        name = node.label
        if name in by_name:
            report.factorized.append(by_name.pop(name))
        elif name in left and is_layer(node, work.model.graph):
            params = sum(int(np.prod(work.model.graph.weights[w].shape)) for w in layer_weights(node, work.model.graph))
            cost = macs(node, work.shape)
            report.factorized.append(
                FactorizedLayer(name, node.op, reason=left[name], params_before=params, params_after=params)
            )
            report.factorized[-1].macs_before = report.factorized[-1].macs_after = cost
    report.factorized += by_name.values()
    known = {f.name for f in report.factorized}
    report.factorized += [FactorizedLayer(n, "", reason=why) for n, why in left.items() if n not in known]
    report.warnings += [f"{d.opened.layer.name}: {d.note}" for d in done if d.note]
    bad = [name for name, why in left.items() if "NaN" in why]
    if bad:
        report.warnings.append(f"left alone, since weights hold NaN or infinity: {', '.join(bad[:4])}")
    totals, analysis = report.totals, state.analyzed()
    totals.params_before = state.original.parameters
    totals.params_after = _parameters(state.weights)
    totals.macs_before = totals.macs_before or sum(x.macs_before for x in state.original.layers)
    assert state.proto is not None
    graph = Graph.of(state.proto, state.weights)
    shape = probe_at(graph, analysis.facts.probes[0].inputs, infer_by_rule).shapes.get
    totals.macs_after = sum(macs(node, shape) for node in graph.steps if is_layer(node, graph))


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


def _parameters(weights: Mapping[str, Weight]) -> int:
    return sum(int(np.prod(w.shape)) for w in weights.values())
