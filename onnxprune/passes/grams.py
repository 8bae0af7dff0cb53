"""Second moments of the inputs of layers, captured from the user's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxprune.channels.analysis import Analysis
from onnxprune.graph.view import Graph, Node
from onnxprune.importance import statistics
from onnxprune.io.subgraphs import Inner, hidden_tensors
from onnxprune.io.weights import Weight
from onnxprune.operators.contractions import Form, rows_per_sample
from onnxprune.passes.calibrate import bytes_per_sample, columns_of, shared_columns
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.comparable import inside
from onnxprune.pipeline import Context
from onnxprune.runtime.capture import Request as CaptureRequest
from onnxprune.runtime.capture import capture
from onnxprune.sparsification.scores import InputGram

# Bytes of all second moments together, and of those of one layer: beyond, positions of a kernel share their moments.
_ALL, _ONE = 2 << 30, 256 << 20

Reader = tuple[Node, Form, int]
"""A node, its matrix form, and the number of input channels of a part."""
_Key = tuple[Any, ...]


def input_grams(
    context: Context,
    analysis: Analysis,
    graph: Graph,
    weights: Mapping[str, Weight],
    readers: Mapping[str, Sequence[Reader]],
    source: CalibrationBatches | None = None,
) -> dict[str, InputGram]:
    """Capture the second moments of the inputs of layers, {layer: moments}; layers out of sight have none.

    Args:
        context: context of the run, with calibration data.
        analysis: analysis of the model before pruning.
        graph: the graph to run.
        weights: its weights.
        readers: {layer: the nodes that read its weight}; moments are the mean over the nodes.
        source: part of the data; None: all.

    Raises:
        UsageError: the data do not fit. ModelError: the model does not run, or holds NaN.
    """
    source = source or CalibrationBatches(context, analysis)
    requests: dict[_Key, CaptureRequest] = {}
    keys: dict[str, list[_Key]] = {}
    # A model that was pruned meanwhile has other sizes than the analysis.
    types = {name: inner._replace(sizes=None) for name, inner in inside(analysis).items()}
    types = {**dict.fromkeys(graph.inner, Inner(TensorProto.FLOAT, 0)), **types}
    unseen = hidden_tensors(graph.proto, types)
    remaining = min(_ALL, context.memory_limit or _ALL)
    for name, nodes in readers.items():
        _, form, channels = nodes[0]
        full = _fits_in_full(form, channels, remaining)
        if full is None or any(unseen & _needed_for(graph, node, node_form) for node, node_form, _ in nodes):
            continue
        for node, node_form, _ in nodes:
            key = (node.inputs[node_form.data], node_form.key, full, graph.conditions(node.index))
            keys.setdefault(name, []).append(key)
            if key not in requests:
                requests[key] = _request(key, node_form, channels, full, source.samples)
                remaining -= _bytes(node_form, channels, full)
    with context.stage("capture"):
        capture(
            (graph.proto, weights),
            list(requests.values()),
            source,
            types=types,
            sizes=bytes_per_sample(analysis, (r.tensor for r in requests.values())),
            limits=source.limits(context.memory_limit),
            tell=lambda share: context.tell("capture", share),
        )
    results = {key: request.statistic.result() for key, request in requests.items()}
    return {
        name: _mean([results[k] for k in weight_keys], weight_keys[0][2])
        for name, weight_keys in keys.items()
        if all(map(results.get, weight_keys))
    }


def _mean(results: Sequence[dict[str, Any]], full: bool) -> InputGram:
    """Return the mean over all nodes that read a weight."""
    gram = results[0]["gram"] if len(results) == 1 else np.mean([r["gram"] for r in results], axis=0)
    mean = np.mean([r["column_mean"] for r in results], axis=0)
    rows = int(sum(float(r["rows"]) for r in results))
    return InputGram(gram if full else None, None if full else gram, mean, rows)


def _needed_for(graph: Graph, node: Node, form: Form) -> set[str]:
    """Return the tensors to capture for a layer: its inputs, and the conditions under which it runs."""
    return {node.inputs[form.data], *(name for name, _ in graph.conditions(node.index))}


def _bytes(form: Form, channels: int, full: bool) -> int:
    return 8 * form.parts * (channels * form.taps if full else channels) ** 2


def _fits_in_full(form: Form, channels: int, remaining: int) -> bool | None:
    """Return whether memory suffices for the moments of all columns; None where not even for those of channels."""
    if _bytes(form, channels, True) <= min(remaining, _ONE):
        return True
    return False if _bytes(form, channels, False) <= min(remaining, _ONE) else None


def _request(key: _Key, form: Form, channels: int, full: bool, samples: int | None) -> CaptureRequest:
    arrange = (
        columns_of(form, rows_per_sample(form, channels * form.parts, samples))
        if full
        else shared_columns(form.axes, form.parts)
    )
    statistic = statistics.get("gram")()
    growth = form.taps if full else 1
    joins = 0 not in form.axes
    return CaptureRequest(f"gram {key!r}", key[0], arrange, statistic, growth, joins, key[3], tuple(form.axes))
