"""Equal constants that an exporter merged tie nothing together, and are one again where a cut leaves them alike."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import Net
from oracle import assert_exact_cut

import onnxprune as op


def chain(kind: str, value: float) -> onnx.ModelProto:
    """Three layers of 8 that share one vector: as scale of a normalisation, or as zero point of weights or biases."""
    net = Net(opset=17)
    x = net.input("x", ["N", 8])
    shared = net.const(np.full(8, value), np.float32 if kind == "scale" else kind, name="shared")
    for number in range(3):
        if kind == "scale":
            x = net.op("Mul", net.op("MatMul", x, net.weight(8, 8, name=f"w{number}")), shared)
        elif kind == "int32":
            codes = net.const(net.rng.integers(-9, 9, 8), kind)
            bias = net.op("DequantizeLinear", codes, net.const(np.full(8, 0.01 + 0.001 * number)), shared, axis=0)
            x = net.op("Add", net.op("MatMul", x, net.weight(8, 8, name=f"w{number}")), bias)
        else:
            codes = net.rng.integers(-100, 100, (8, 8))
            scale = net.const(np.linspace(0.01, 0.02, 8), name=f"s{number}")
            stored = net.const(codes, kind, name=f"w{number}")
            x = net.op("MatMul", x, net.op("DequantizeLinear", stored, scale, shared, axis=1))
        x = net.op("Relu", x)
    return net.model(net.op("MatMul", x, net.weight(8, 4, name="last")))


@pytest.mark.parametrize(("kind", "value"), [("scale", 1.0), ("int8", 0), ("int32", 0), ("int8", 3)])
def test_a_merged_vector_ties_no_layers_together(kind: str, value: float) -> None:
    model = chain(kind, value)
    assert [g.size for g in op.analyze(model).units.groups if g.prunable] == [8, 8, 8]
    result = assert_exact_cut(model, ratio=0.5)
    kept = [t for t in result.model.graph.initializer if t.name.startswith("shared")]
    assert [list(t.dims) for t in kept] == [[4]]


def test_vectors_of_different_sizes_stay_apart() -> None:
    result = op.prune(chain("int8", 0), ratio=0.5, layers={"w1": 0.25}, latency=False)
    assert result.report.exactness.passed
    kept = {t.name: t.dims[0] for t in result.model.graph.initializer if t.name.startswith("shared")}
    assert sorted(kept.values()) == [4, 6]


def test_a_vector_of_different_values_keeps_its_readers_together() -> None:
    model = chain("int8", 0)
    zero = next(t for t in model.graph.initializer if t.name == "shared")
    zero.CopyFrom(onnx.numpy_helper.from_array(np.arange(8, dtype=np.int8), "shared"))
    assert [g.size for g in op.analyze(model).units.groups if g.prunable] == [8]
