"""Recurrent layers written out: the same outputs, and gradients that agree with central differences."""

from __future__ import annotations

from typing import Any

import numpy as np
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
