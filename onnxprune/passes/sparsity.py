"""The zeros that a file holds: density and pattern of every layer, and whether N:M holds everywhere it should."""

from __future__ import annotations

from collections import Counter

from onnxprune.channels.analysis import Analysis
from onnxprune.passes.prepared import Prepared
from onnxprune.passes.sparsify import scan_layers
from onnxprune.report.facts import SparsityFacts
from onnxprune.sparsification.patterns import Pattern, named


def measure_sparsity(analysis: Analysis) -> list[SparsityFacts]:
    """Return density and pattern of every weight of a layer, in the order of the graph.

    Where layers hold N:M, the most frequent one is expected of every layer that a sparsification would take by default
    and whose input channels are a multiple of M.

    Args:
        analysis: analysis of the model.
    """
    model = Prepared(analysis.loaded.proto, analysis.loaded.weights)
    layers = scan_layers(analysis, model).layers
    facts, masks = [], []
    for layer in layers:
        zeros = layer.read(model.weights) == 0
        pattern = named(zeros, layer.channels)
        op = layer.node.op
        facts.append(SparsityFacts(layer.name, op, layer.source.root, layer.size, int(zeros.sum()), pattern))
        masks.append(zeros if zeros.any() else None)
    counts = Counter(f.pattern for f in facts if ":" in f.pattern)
    if not counts:
        return facts
    expected = Pattern.of(max(counts, key=lambda text: (counts[text], text)))
    for layer, fact, zeros in zip(layers, facts, masks, strict=True):
        if not layer.default_reason and not layer.misfit(expected):
            fact.expected = str(expected)
            fact.holds = zeros is not None and expected.holds(zeros)
    return facts
