"""Recurrent layers written out: the same outputs, and gradients that agree with central differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net
from differences import check, static

from onnxprune.gradients.backward import inference_graph
from onnxprune.gradients.recurrent import MAX_STEPS
from onnxprune.gradients.tape import Tape

X = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)


def layer(kind: str, *, direction: str = "forward", bias: bool = True, states: bool = False, **attrs: Any) -> Net:
    net, gates, hidden = Net(18), {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 3
    count = 2 if direction == "bidirectional" else 1
    x = net.input("x", ["T", "N", 4])
    operands = [x, net.weight(count, gates * hidden, 4), net.weight(count, gates * hidden, hidden)]
    operands.append(net.weight(count, 2 * gates * hidden, scale=0.3) if bias else "")
    if states:
        shape = (2, count, hidden) if attrs.get("layout") else (count, 2, hidden)
        operands += ["", *(net.weight(*shape) for _ in range(2 if kind == "LSTM" else 1))]
    net.op(kind, *operands, n=3 if kind == "LSTM" else 2, direction=direction, hidden_size=hidden, **attrs)
    return net


def outputs(net: Net) -> list[str]:
    return list(net.nodes[-1].output)


CASES: list[dict[str, Any]] = [
    {"kind": "LSTM"},
    {"kind": "LSTM", "direction": "bidirectional", "states": True},
    {"kind": "LSTM", "direction": "reverse", "bias": False},
    {"kind": "GRU", "states": True},
    {"kind": "GRU", "direction": "bidirectional", "linear_before_reset": 1},
    {"kind": "GRU", "bias": False, "linear_before_reset": 1},
    {"kind": "RNN", "direction": "bidirectional", "states": True},
    {"kind": "RNN", "direction": "reverse"},
]


@pytest.mark.parametrize("case", CASES)
def test_they_agree(case: dict[str, Any]) -> None:
    net = layer(**case)
    model = net.model(*outputs(net), check=False, shapes=dict.fromkeys(outputs(net)))
    graph = static(model, {"x": X})
    assert case["kind"] not in {node.op for node in graph.nodes}
    written = inference_graph(graph, Tape(graph.shapes, graph.kinds), outputs(net))
    one, other = (
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(outputs(net), {"x": X})
        for m in (model, written)
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    check(model, {"x": X})


@pytest.mark.parametrize("attrs", [{"clip": 0.5}, {"activations": ["Relu", "Tanh", "Tanh"]}])
def test_other_forms_stay(attrs: dict[str, Any]) -> None:
    net = layer("LSTM", **attrs)
    model = net.model(*outputs(net), check=False, shapes=dict.fromkeys(outputs(net)))
    assert "LSTM" in {node.op for node in static(model, {"x": X}).nodes}


def test_long_ones_stay() -> None:
    net = layer("RNN")
    model = net.model(*outputs(net), check=False, shapes=dict.fromkeys(outputs(net)))
    assert "RNN" in {node.op for node in static(model, {"x": np.zeros((MAX_STEPS + 1, 2, 4), np.float32)}).nodes}


SCAN = """<ir_version: 8, opset_import: ["" : 18]>
net (float[3, 2, 4] x) => (float[2, 4] last, float[2, 3, 4] all)
  <float[4, 4] w, float[4] b, float[2, 4] h0> {{
  last, all = Scan <num_scan_inputs = 1, scan_input_axes = [0], scan_input_directions = [{turn}],
    scan_output_axes = [1], scan_output_directions = [{turn}],
    body = step (float[2, 4] h, float[2, 4] row) => (float[2, 4] h1, float[2, 4] y) {{
      two = Constant <value = float {{2}}> ()
      product = MatMul (h, w)
      sum = Add (product, row)
      h1 = Tanh (sum)
      y = Mul (h1, two)
    }}> (h0, x)
}}"""
LOOP = """<ir_version: 8, opset_import: ["" : 18]>
net (float[3, 2, 4] x) => (float[2, 4] last, float[3, 2, 4] all)
  <float[4, 4] w, float[2, 4] h0, int64 n = {{3}}, bool go = {{1}}> {{
  last, all = Loop <body = step (int64 i, bool c, float[2, 4] h) => (bool c1, float[2, 4] h1, float[2, 4] y) {{
      {condition}
      row = Gather (x, i)
      product = MatMul (h, w)
      sum = Add (product, row)
      h1 = Tanh (sum)
      y = Identity (h1)
    }}> (n, go, h0)
}}"""


def looped(text: str) -> onnx.ModelProto:
    """The model of a text with weights for those it declares without values."""
    model = onnx.parser.parse_model(text)
    known = {t.name for t in model.graph.initializer}
    rng = np.random.default_rng(2)
    for value in list(model.graph.value_info):
        if value.name in {"w", "b", "h0"} and value.name not in known:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            tensor = onnx.numpy_helper.from_array(0.5 * rng.standard_normal(shape).astype(np.float32), value.name)
            model.graph.initializer.append(tensor)
            model.graph.value_info.remove(value)
    return model


@pytest.mark.parametrize(
    "text",
    [
        SCAN.format(turn=0),
        SCAN.format(turn=1),
        LOOP.format(condition="c1 = Identity (c)"),
        LOOP.format(condition="c1 = Constant <value = bool {1}> ()"),
    ],
)
def test_loops_of_a_known_length_agree(text: str) -> None:
    model = looped(text)
    graph = static(model, {"x": X})
    assert not {"Scan", "Loop"} & {node.op for node in graph.nodes}
    written = inference_graph(graph, Tape(graph.shapes, graph.kinds), ["last", "all"])
    one, other = (
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(["last", "all"], {"x": X})
        for m in (model, written)
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert {"w", "h0"} <= set(graph.variables)
    check(model, {"x": X}, ["w", "h0"])


def test_loops_that_may_end_earlier_or_are_large_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = looped(LOOP.format(condition="two = Constant <value = int64 {2}> ()\n c1 = Less (i, two)"))
    assert "Loop" in {node.op for node in static(model, {"x": X}).nodes}
    monkeypatch.setattr("onnxprune.gradients.loops.MAX_NODES", 14)
    assert "Scan" in {node.op for node in static(looped(SCAN.format(turn=0)), {"x": X}).nodes}
