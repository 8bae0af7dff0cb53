"""What layers read, as second moments: the metric in which a factorization errs least at their outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxprune import statistics
from onnxprune.analysis import Analysis
from onnxprune.contractions import Form, rows_per_sample
from onnxprune.decompose import Metric
from onnxprune.factors.layer import Layer
from onnxprune.graph.view import Graph, Node
from onnxprune.model.exposing import Inner, hidden
from onnxprune.model.weights import Weight
from onnxprune.passes.calibrate import bytes_per_sample, columns_of, shared_columns
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.comparable import inside
from onnxprune.pipeline import Context
from onnxprune.runtime.capture import MEMORY, Request, capture

# Bytes of all second moments together, and of those of one layer: beyond, positions of a kernel share their moments.
_ALL, _ONE = 2 << 30, 256 << 20


@dataclass(frozen=True, slots=True)
class Seen:
    """What the data show of a layer's input.

    Attributes:
        metric: for errors of its weights. mean: of its columns [parts, n], where a bias can take up what the mean
            causes: the metric is then about the mean.
    """

    metric: Metric
    mean: NDArray[np.float64] | None = None


def seen_by(
    context: Context, analysis: Analysis, graph: Graph, weights: Mapping[str, Weight], layers: Sequence[Layer]
) -> dict[str, Seen]:
    """Second moments of what every layer reads, {name of the layer: what is seen}; without data the identity.

    Raises:
        UsageError: the data do not fit. ModelError: the model does not run, or holds NaN.
    """
    plain = {layer.name: Seen(Metric()) for layer in layers}
    if context.calibration is None:
        return plain
    source = CalibrationBatches(context, analysis)
    requests: dict[tuple[Any, ...], Request] = {}
    keys: dict[str, list[tuple[Any, ...]]] = {}
    shared: dict[str, bool] = {}
    # Of a model that was cut meanwhile the sizes are not those of the analysis.
    types = {name: inner._replace(sizes=None) for name, inner in inside(analysis).items()}
    types = {**dict.fromkeys(graph.inner, Inner(TensorProto.FLOAT, 0)), **types}
    unseen = hidden(graph.proto, types)
    left = min(_ALL, context.memory_limit or _ALL)
    for layer in layers:
        form = layer.described.form
        whole = None if form is None else _whole(layer, left)
        if form is None or whole is None or any(unseen & _seen_at(graph, use.node, form) for use in layer.uses):
            continue
        shared[layer.name] = not whole
        for use in layer.uses:
            key = (use.node.inputs[form.data], form.key, whole, graph.conditions(use.node.index))
            keys.setdefault(layer.name, []).append(key)
            if key not in requests:
                requests[key] = _request(key, layer, form, whole, source.samples)
                left -= _bytes(layer, whole)
    with context.stage("capture"):
        capture(
            (graph.proto, weights),
            list(requests.values()),
            source,
            least=source.fixed or 1,
            most=source.fixed or source.max_size,
            types=types,
            sizes=bytes_per_sample(analysis, list(requests.values())),
            memory=min(MEMORY, context.memory_limit or MEMORY),
            tell=lambda share: context.tell("capture", share),
        )
    results = {key: request.statistic.result() for key, request in requests.items()}
    return plain | {
        layer.name: _seen(layer, [results[k] for k in keys[layer.name]], shared[layer.name], weights)
        for layer in layers
        if layer.name in keys
    }


def _seen_at(graph: Graph, node: Node, form: Form) -> set[str]:
    """What has to be seen for a layer: what it reads, and whether it runs."""
    return {node.inputs[form.data], *(name for name, _ in graph.conditions(node.index))}


def _bytes(layer: Layer, whole: bool) -> int:
    shape = layer.shape
    return 8 * shape.parts * (shape.columns if whole else shape.inputs) ** 2


def _whole(layer: Layer, left: int) -> bool | None:
    """Whether there is room for the moments of all columns; if not for those of channels either, None."""
    if _bytes(layer, True) <= min(left, _ONE):
        return True
    return False if _bytes(layer, False) <= min(left, _ONE) else None


def _request(key: tuple[Any, ...], layer: Layer, form: Form, whole: bool, samples: int | None) -> Request:
    arrange = (
        columns_of(form, rows_per_sample(form, layer.shape.inputs * form.parts, samples))
        if whole
        else shared_columns(form.axes, form.parts)
    )
    statistic = statistics.get("gram")()
    return Request(f"gram {key!r}", key[0], arrange, statistic, form.taps if whole else 1, 0 not in form.axes, key[3])


def _seen(layer: Layer, results: Sequence[dict[str, Any]], shared: bool, weights: Mapping[str, Weight]) -> Seen:
    """The moments of one layer, of all nodes that read its weight together."""
    if not all(results):
        return Seen(Metric())
    gram = np.mean([r["gram"] for r in results], axis=0)
    mean = np.mean([r["column_mean"] for r in results], axis=0)
    centred = not shared and _takes_shift(layer, weights)
    if centred:
        gram = gram - mean[:, :, None] * mean[:, None, :]
    metric = Metric(shared=gram) if shared else Metric(full=gram)
    return Seen(metric, mean if centred else None)


def _takes_shift(layer: Layer, weights: Mapping[str, Weight]) -> bool:
    """Whether every node that reads the weight has a place for a bias of its own, one constant per output."""
    position, form = layer.operator.bias(layer.uses[0].node), layer.described.form
    # Gemm's bias lies along its last axis, and so have the outputs to.
    if position is None or form is None or form.output_axis(2) != 1:
        return False
    for use in layer.uses:
        given = use.node.inputs[position] if position < len(use.node.inputs) else ""
        scaled = any(float(use.node.attrs.get(name, 1.0)) != 1.0 for name in ("alpha", "beta"))
        if scaled or (given and given not in weights):
            return False
    return True
