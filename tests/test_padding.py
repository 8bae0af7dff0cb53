"""Padding is no data: what stands at positions that an attention mask leaves out changes no score and no judgement."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

import onnxprune as op
from onnxprune.gradients.backward import training_graph
from onnxprune.gradients.static import StaticGraph, static_graph
from onnxprune.io.read import load
from onnxprune.io.weights import ArrayWeight
from onnxprune.runtime.masks import Padding
from onnxprune.runtime.sessions import Feed
from onnxprune.training.losses import Losses, deviation
from onnxprune.training.parameters import Head
from onnxprune.training.step import Parameters, Step
from onnxprune.training.teacher import Teacher

WIDTH, CLASSES, LENGTH = 8, 5, 6
TEXT = """<ir_version: 8, opset_import: ["" : 17]>
net (float[N, S, 8] x, int64[N, S] attention_mask) => (float[N, S, 5] logits) {
  mask = Cast <to = 1> (attention_mask)
  hidden = Sub (one, mask)
  far = Mul (hidden, least)
  bias = Unsqueeze (far, axis)
  q = MatMul (x, wq)
  k = MatMul (x, wk)
  v = MatMul (x, wv)
  kt = Transpose <perm = [0, 2, 1]> (k)
  qk = MatMul (q, kt)
  masked = Add (qk, bias)
  share = Softmax <axis = -1> (masked)
  mixed = MatMul (share, v)
  written = MatMul (mixed, wo)
  y = Add (x, written)
  h = MatMul (y, up)
  a = Relu (h)
  d = MatMul (a, down)
  z = Add (y, d)
  logits = MatMul (z, head)
}"""


def network() -> onnx.ModelProto:
    """A layer of a transformer that takes a mask."""
    draw = np.random.default_rng(0)
    model = parser.parse_model(TEXT)
    shapes = {"up": (WIDTH, 24), "down": (24, WIDTH), "head": (WIDTH, CLASSES)}
    shapes |= dict.fromkeys(("wq", "wk", "wv", "wo"), (WIDTH, WIDTH))
    values = {name: draw.normal(size=shape).astype(np.float32) / 3 for name, shape in shapes.items()}
    values |= {"one": np.float32(1), "least": np.float32(-1e9), "axis": np.array([1], np.int64)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in values.items())
    return model


def padded(noise: float, samples: int = 24) -> dict[str, NDArray[np.generic]]:
    """Sequences of 2 to 6 positions, and any numbers behind them."""
    draw, lengths = np.random.default_rng(1), np.arange(samples) % 5 + 2
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int64)
    x = draw.normal(size=(samples, LENGTH, WIDTH)).astype(np.float32)
    return {"x": np.where(mask[:, :, None] == 1, x, np.float32(noise) * x[:, ::-1]), "attention_mask": mask}


SETTINGS = {
    "wanda": {"criterion": "wanda"},
    "ziplm": {"criterion": "ziplm"},
    "nuclear": {"criterion": "nuclear"},
    "taylor": {"criterion": "taylor"},
    "measured": {"criterion": "l2", "scope": "global", "normalize": "measured"},
    "depth": {"depth": 1},
    "recovered": {"recover": "full"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_padding_changes_neither_a_plan_nor_a_fidelity(settings: dict[str, object]) -> None:
    settings = {"ratio": 0.5, "recover": "none", "latency": False, **settings}
    one, other = (op.prune(network(), data=padded(noise), **settings) for noise in (0.0, 30.0))
    assert [g.removed for g in one.plan.groups] == [g.removed for g in other.plan.groups]
    first, second = one.report.fidelity, other.report.fidelity
    assert first is not None and second is not None and first.points is not None and first.points < 100
    assert first.points == pytest.approx(second.points, abs=1e-3)
    for a, b in zip(first.outputs, second.outputs, strict=True):
        assert (a.cosine, a.top1) == pytest.approx((b.cosine, b.top1), abs=1e-5)


def test_scores_are_those_of_sequences_that_were_never_padded() -> None:
    data = padded(30.0)
    lengths = data["attention_mask"].sum(axis=1)
    alone = [{name: value[i : i + 1, : lengths[i]] for name, value in data.items()} for i in range(len(lengths))]
    settings = {"criterion": "wanda", "ratio": 0.5, "recover": "none", "latency": False}
    one, other = (op.prune(network(), data=inputs, **settings) for inputs in (data, alone))
    assert [g.removed for g in one.plan.groups] == [g.removed for g in other.plan.groups]
    for a, b in zip(one.report.groups, other.report.groups, strict=True):
        assert a == b
    assert one.report.fidelity.outputs[0].cosine == pytest.approx(other.report.fidelity.outputs[0].cosine, abs=1e-6)


def test_a_factorization_does_not_fit_padding() -> None:
    one, other = (
        op.factorize(network(), method="svd", ratio=0.3, data=padded(noise), recover="none", latency=False)
        for noise in (0.0, 30.0)
    )
    errors = [[layer.error for layer in result.report.factorized] for result in (one, other)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_parts_of_arrays_without_padding() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0]])
    padding = Padding({"mask": mask})
    values = {
        "tokens": np.arange(9).reshape(3, 3, 1),
        "heads": np.arange(36).reshape(3, 2, 3, 2),
        "flat": np.arange(9).reshape(9, 1),
        "pooled": np.arange(3),
        "unclear": np.zeros((3, 3, 3, 2)),
        "scalar": np.float32(1),
    }
    (short,), (long,) = padding.parts([values])
    assert short["tokens"].ravel().tolist() == [3] and long["tokens"].ravel().tolist() == [0, 1, 6, 7]
    assert long["heads"].shape == (2, 2, 2, 2) and (long["heads"] == values["heads"][[0, 2], :, :2]).all()
    assert long["flat"].ravel().tolist() == [0, 1, 6, 7] and long["pooled"].tolist() == [0, 2]
    assert long["unclear"].shape == (2, 3, 3, 2) and long["scalar"] == 1
    assert list(Padding({"mask": np.ones((3, 3))}).parts([values])) == [[values]]


FITTED = {"scores": "logits", "values": "y", "logits": "certain", "rows": "flat"}
"""Heads and what lies between blocks, as tensors with an axis of positions, or with samples and positions together."""


def together() -> onnx.ModelProto:
    """Return the layer with another output, of probabilities that stand alone, and with a tensor of joined rows."""
    model = network()
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, WIDTH], np.int64), "joined"))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["z", "joined"], ["flat"]))
    model.graph.node.append(onnx.helper.make_node("Sigmoid", ["z"], ["certain"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("certain", 1, ["N", "S", WIDTH]))
    return model


def graph_of(feed: Feed, scale: float = 1.0) -> StaticGraph:
    """Return the layer at the size of a call, with its weights times a number."""
    loaded = load(together())
    weights = {n: ArrayWeight(n, (w.read() * scale).astype(w.dtype)) for n, w in loaded.weights.items() if n in SCALED}
    return static_graph(loaded.proto, {**loaded.weights, **weights}, feed)


SCALED = ("up", "down", "head", "wq", "wk", "wv", "wo")


def gradients_of(feed: Feed, kind: str) -> tuple[float, NDArray[np.float32]]:
    """Return the loss of a call and its gradients, against a layer with smaller weights."""
    student, original = graph_of(feed), graph_of(feed, 0.8)
    tensor = FITTED[kind]
    head = Head(tensor, "", {"scores": 2}.get(kind), {"logits": "z"}.get(kind, ""))
    is_head = kind in ("scores", "logits")
    teacher = Teacher(original, student, [head] if is_head else [], {} if is_head else {tensor: []}, feed)
    name, counted = teacher.names[tensor], teacher.counted[tensor]
    if is_head:
        losses = Losses({head: name}, {}, {}, teacher.counted)
        training = training_graph(student, losses.emit, SCALED, inputs=teacher.inputs)
    else:
        training = training_graph(student, lambda t: deviation(t, tensor, name, counted), SCALED, inputs=teacher.inputs)
    parameters = Parameters({n: student.constants[n] for n in SCALED if n in training.gradients})
    step = Step(training, parameters, threads=1)
    return step([{**feed, **teacher(feed)}]), step.gradient


@pytest.mark.parametrize("kind", FITTED)
def test_gradients_are_those_of_sequences_that_were_never_padded(kind: str) -> None:
    feed = padded(30.0, 8)
    feed["attention_mask"][:, :4], feed["attention_mask"][:, 4:] = 1, 0
    short = {name: value[:, :4] for name, value in feed.items()}
    (loss, gradient), (same_loss, same_gradient) = gradients_of(feed, kind), gradients_of(short, kind)
    assert loss == pytest.approx(same_loss, rel=1e-5) and loss > 1e-3
    np.testing.assert_allclose(gradient, same_gradient, rtol=1e-4, atol=1e-6 * float(np.abs(gradient).max()))
    assert np.abs(gradient).max() > 1e-4


@pytest.mark.parametrize(("blocks", "labelled"), [("no", False), ("no", True), ("yes", False)])
def test_a_training_does_not_fit_padding(blocks: str, labelled: bool) -> None:
    labels = np.random.default_rng(3).normal(size=(64, 5, CLASSES)).astype(np.float32) if labelled else None
    settings = {"ratio": 0.5, "criterion": "l2", "recover": "none", "latency": False, "finetune": 6, "blocks": blocks}
    facts = []
    for noise in (0.0, 30.0):
        data = {name: value[:, :5] for name, value in padded(noise, 64).items()}
        facts.append(op.prune(network(), data=data, labels=labels, **settings).report.finetuning)
    one, other = facts
    assert one.steps == other.steps and not one.undone and bool(one.blocks) == (blocks == "yes")
    assert one.losses == pytest.approx(other.losses, rel=1e-4)
    assert np.allclose(one.curve, other.curve, rtol=1e-4)
    assert one.by_labels == pytest.approx(other.by_labels, rel=1e-4)
