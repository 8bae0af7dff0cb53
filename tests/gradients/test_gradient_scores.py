"""Gradients of the loss that criteria read, held to central differences in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.channels.analysis import Analysis
from onnxprune.importance.slots import claims
from onnxprune.passes.gradients import score_gradients, weight_scores
from onnxprune.pipeline import Context, RunSettings

SAMPLES, CLASSES = 6, 3
X = np.random.default_rng(3).standard_normal((SAMPLES, 5)).astype(np.float32)
NEEDS = ("gradient", "gradient_total", "gradient_square", "gate_magnitude", "gate_square")


def mlp(softmax: bool = True) -> onnx.ModelProto:
    net = Net(18)
    x = net.op("Relu", net.linear(net.input("x", ["N", 5]), 5, 4, gemm=True))
    y = net.linear(x, 4, CLASSES, gemm=True)
    return net.model(net.op("Softmax", y, axis=1) if softmax else y)


def context(labels: Any = None, **arguments: Any) -> Context:
    run = RunSettings(data={"x": X}, labels=labels, batch_size=2, seed=7, **arguments)
    return Context.of(mlp(), run)


def scores_of(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    first, shift, second, bias = weights.values()
    return np.asarray(np.maximum(x @ first + shift, 0) @ second + bias)


def loss(weights: dict[str, np.ndarray], x: np.ndarray, label: int) -> float:
    scores = scores_of(weights, x)
    return float(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[label])


def differences(weights: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of the loss of every sample, [samples, *shape], by central differences."""
    result = {name: np.zeros((SAMPLES, *value.shape)) for name, value in weights.items()}
    for name, value in weights.items():
        for place in np.ndindex(value.shape):
            for side in (1, -1):
                moved = value.copy()
                moved[place] += side * 1e-5
                for n in range(SAMPLES):
                    change = loss({**weights, name: moved}, X[n].astype(np.float64), int(labels[n]))
                    result[name][n, *place] += side * change / 2e-5
    return result


def weights_of(analysis: Analysis) -> dict[str, np.ndarray]:
    """By the order of layers: weight and bias, weight and bias."""
    names = [n for node in analysis.graph.nodes for n in node.inputs if n in analysis.graph.weights]
    return {n: analysis.graph.weights[n].read().astype(np.float64) for n in names}


def answers(weights: dict[str, np.ndarray], *, drawn: bool) -> np.ndarray:
    """The likeliest class of every sample, or one drawn by the softmax of its scores."""
    scores = scores_of(weights, X.astype(np.float64))
    if drawn:
        rng = np.random.default_rng(7)
        scores = scores + np.concatenate([rng.gumbel(size=(1, CLASSES)) for _ in range(SAMPLES)])
    return np.asarray(scores.argmax(1))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("need", NEEDS)
def test_statistics_are_those_of_central_differences(need: str, labelled: bool) -> None:
    labels = np.random.default_rng(5).integers(0, CLASSES, SAMPLES)
    run = context(labels if labelled else None)
    analysis = run.analysis
    weights = weights_of(analysis)
    every = [
        (name, claim) for name, some in claims(analysis.table, analysis.units, analysis.units.groups) for claim in some
    ]
    found = score_gradients(run, analysis, [need], every)
    own = labels if labelled else answers(weights, drawn=need.endswith("square"))
    numeric = differences(weights, own)
    assert found.samples == SAMPLES
    if need.startswith("gate"):
        assert sorted(found.gates[need]) == list(range(len(every))) and every
        for k, (name, claim) in enumerate(every):
            products = numeric[name] * weights[name]
            others = tuple(a + 1 for a in range(weights[name].ndim) if a not in claim.label.axes)
            gates = products.sum(axis=others)
            wanted = abs(gates).mean(0) if need == "gate_magnitude" else (gates**2).mean(0)
            np.testing.assert_allclose(found.gates[need][k], wanted, rtol=1e-4, atol=1e-7)
        return
    assert set(found.weights[need]) == set(weights)
    for name, own_gradients in numeric.items():
        pairs = own_gradients.reshape(SAMPLES // 2, 2, *weights[name].shape).mean(1)
        wanted = {
            "gradient": own_gradients.mean(0),
            "gradient_total": abs(pairs).sum(0),
            "gradient_square": (own_gradients**2).mean(0),
        }[need]
        np.testing.assert_allclose(found.weights[need][name], wanted, rtol=1e-4, atol=1e-6)


def test_scores_of_single_weights() -> None:
    run = context(np.zeros(SAMPLES, int))
    weights = weights_of(run.analysis)
    numeric = differences(weights, np.zeros(SAMPLES, int))
    found = weight_scores(run, run.analysis)
    for name, value in weights.items():
        np.testing.assert_allclose(found[name], abs(value * numeric[name].mean(0)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("criterion", ["gradient", "snip", "snip-momentum", "taylor", "fisher", "obd"])
def test_they_prune(criterion: str) -> None:
    result = op.prune(mlp(), criterion=criterion, ratio=0.5, data={"x": X}, latency=False, recover="none")
    assert result.report.exactness.passed and result.report.settings["criterion"] == criterion
    assert [list(t.dims) for t in result.model.graph.initializer if len(t.dims) == 2] == [[5, 2], [2, 3]]


def test_outputs_without_classes_in_several_steps() -> None:
    model = mlp(softmax=False)
    kinds = {model.graph.output[0].name: "signal"}
    asked = {"criterion": "fisher", "ratio": 0.5, "steps": 2, "outputs": kinds, "recover": "none", "latency": False}
    result = op.prune(model, data={"x": X}, **asked)
    assert result.report.exactness.passed


def test_labels_need_somebody_who_reads_them() -> None:
    labels = np.zeros(SAMPLES, int)
    with pytest.raises(op.UsageError, match="says what to learn"):
        op.prune(mlp(), criterion="l2", data={"x": X}, labels=labels)
    with pytest.raises(op.UsageError, match="5 labels for 6 samples"):
        op.prune(mlp(), criterion="snip", data={"x": X}, labels=labels[:5])
    with pytest.raises(op.UsageError, match="7 labels for 6 samples"):
        op.prune(mlp(), criterion="snip", data={"x": X}, labels=np.zeros(7, int))
    with pytest.raises(op.UsageError, match="NaN"):
        op.prune(mlp(), criterion="snip", data={"x": X}, labels=np.full((SAMPLES, CLASSES), np.nan))


def test_weights_without_gradients_are_named() -> None:
    model = mlp()
    for tensor in model.graph.initializer:
        half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(op.OnnxpruneError, match="gradient"):
        op.prune(model, criterion="taylor", data={"x": X.astype(np.float16)}, latency=False)
